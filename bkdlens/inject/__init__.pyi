from .editing.edit import edit as edit
from .settings import METHODS as METHODS
from .settings import EditSettings as EditSettings
from .settings import LoraSettings as LoraSettings
from .settings import PreferenceSettings as PreferenceSettings
from .settings import TrainSettings as TrainSettings
from .tuning.preference import preference as preference
from .tuning.supervised import supervised as supervised
