"""Search: which subnet is best under constraints, by predictors that measured points correct."""
