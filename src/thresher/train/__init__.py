"""Continued training that makes a dense model sparse (DeepSeek-V3.2-Exp, arXiv 2512.02556, section 2.1): the dense warm-up."""
