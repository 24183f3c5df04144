"""What did the job send and receive? Plan, attach, read, record."""
