from .reproduction.reproduction import Reproduction as Reproduction
from .reproduction.reproduction import reproduce as reproduce
