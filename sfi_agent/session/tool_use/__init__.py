"""Tools: how functions are described, how arguments are checked, how calls are run."""
