from vadd_pyro.schedules import *
from vadd_pyro.process import *
from vadd_pyro.times import *
from vadd_pyro.elbo import *
from vadd_pyro.distributions import *
