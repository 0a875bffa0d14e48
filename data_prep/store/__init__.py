"""What is kept on disk: parts, record files, data sets, reports."""
