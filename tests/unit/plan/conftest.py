from tests.helpers.quiet import no_memo, one_thread  # noqa: F401  (autouse)
