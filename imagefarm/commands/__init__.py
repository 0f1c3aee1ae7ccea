"""The commands of `imagefarm`, one file for each group of them."""
