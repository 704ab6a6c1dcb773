"""The gated activation between the linears of an MLP."""
