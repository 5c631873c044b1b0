"""Questions for training and evaluation, out of the public data sets, as veRL reads them."""
