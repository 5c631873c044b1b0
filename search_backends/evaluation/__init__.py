"""What an evaluation keeps, so that it can be continued, and how sure its figures are."""
