"""Settings of a server: groups by concern, each field with its help, default and bounds; and where they come from."""

from serving.config.cache import KV_CACHE_TYPES, KV_REPLICATION, CacheSettings
from serving.config.detection import DetectionSettings
from serving.config.durability import DurabilitySettings
from serving.config.field import SettingsGroup
from serving.config.http import HttpSettings, listed
from serving.config.launch import LaunchSettings
from serving.config.mesh import MeshSettings
from serving.config.model import DATA_TYPES, ModelSettings
from serving.config.network import NetworkSettings, is_address, is_loopback, split_address
from serving.config.observability import ObservabilitySettings
from serving.config.recovery import RecoverySettings
from serving.config.scheduling import SchedulingSettings
from serving.config.security import SecuritySettings
from serving.config.settings import GROUPS, Settings
from serving.config.sources import ALIAS_VALUES, ALIASES, PREFIX, RENAMED, RENAMED_VALUES

__all__ = [
    "ALIASES",
    "ALIAS_VALUES",
    "DATA_TYPES",
    "GROUPS",
    "KV_CACHE_TYPES",
    "KV_REPLICATION",
    "PREFIX",
    "RENAMED",
    "RENAMED_VALUES",
    "CacheSettings",
    "DetectionSettings",
    "DurabilitySettings",
    "HttpSettings",
    "LaunchSettings",
    "MeshSettings",
    "ModelSettings",
    "NetworkSettings",
    "ObservabilitySettings",
    "RecoverySettings",
    "SchedulingSettings",
    "SecuritySettings",
    "Settings",
    "SettingsGroup",
    "is_address",
    "is_loopback",
    "listed",
    "split_address",
]
