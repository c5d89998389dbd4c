"""From a data set to CORPUS: documents, tokenised once, with what is supervised marked token by token."""
