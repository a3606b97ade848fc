"""When two answers are the same, decided in processes that can be killed."""
