"""One error class for each who-must-act; the command line prints any of them as one line and exits 2."""


class QDeployError(Exception):
    """Base of every error that qdeploy raises on purpose. The message says what to do."""


class RecipeError(QDeployError):
    """A recipe, target or subnet specification is wrong: its author must mend it."""


class DataError(QDeployError):
    """A dataset or an image file is absent, damaged or of the wrong shape."""


class ModelError(QDeployError):
    """A network, checkpoint or ONNX model cannot be taken: unknown operator, broken contract, damaged file."""


class DivergenceError(ModelError):
    """A training met a loss or a gradient that is not finite: lower its learning rate."""


class BundleError(QDeployError):
    """A bundle or manifest is damaged, does not nest, or lacks the level that was asked for."""


class CompileError(QDeployError):
    """The compiler or its target cannot do what was asked."""


class DeviceError(QDeployError):
    """The machine at hand cannot run this: missing instruction set, broken runtime, full disk, port in use."""


class FetchError(QDeployError):
    """A download failed; what was verified is kept and the next call resumes."""


class TrustError(QDeployError):
    """Signed metadata is absent, expired, replayed or signed by the wrong keys; nothing of it was taken."""
