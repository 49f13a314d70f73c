"""How idle threads wait for work; import it before torch.

By default OpenMP's threads spin while they wait, and take a core from whatever else runs there, other threads of the
same program included. Sleeping instead costs nothing on an idle machine. A setting of the user's own is respected.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
