//! The adapter that a run starts from.

use contract::StageError;
use model::{Adapter, Init, LoraConfig, ModelConfig};

use crate::params::Params;

/// A new adapter that needs no weights, as the params say.
pub(super) fn new_adapter(params: &Params, model: &ModelConfig) -> Result<Adapter, StageError> {
    let wanted = params.lora_config();
    Ok(match params.lora.init {
        Init::Kaiming => Adapter::fresh(model, &wanted, params.seed)?,
        Init::Gaussian => Adapter::gaussian(model, &wanted, params.seed)?,
        Init::Pissa | Init::Loftq => {
            let name = if params.lora.init == Init::Pissa { "pissa" } else { "loftq" };
            let message = format!("`lora.init: {name}` is not available on a GPU yet");
            return Err(
                StageError::input(message).help("set `device: cpu`, or another `lora.init`")
            );
        }
    })
}

/// The adapter of input `init_adapter`, which must be of the shape that the params ask for.
pub(super) fn continued(params: &Params, mut adapter: Adapter) -> Result<Adapter, StageError> {
    if params.lora.init != Init::default() {
        return Err(StageError::input(
            "`lora.init` and the input `init_adapter` exclude each other",
        )
        .help("remove one of them"));
    }
    check_same(params, &adapter)?;
    let loftq_iter = adapter.config.loftq_iter;
    adapter.config = LoraConfig { loftq_iter, ..params.lora_config() };
    Ok(adapter)
}

/// Refuses an adapter that is not of the shape the params ask for.
fn check_same(params: &Params, adapter: &Adapter) -> Result<(), StageError> {
    let sorted = |targets: &[String]| {
        let mut targets = targets.to_vec();
        targets.sort();
        targets
    };
    let (wanted, found) = (params.lora_config(), &adapter.config);
    let fault = if wanted.r != found.r {
        format!("has r {}, the params say {}", found.r, wanted.r)
    } else if (wanted.alpha - found.alpha).abs() > 1e-6 * wanted.alpha {
        format!("has alpha {}, the params say {}", found.alpha, wanted.alpha)
    } else if wanted.use_rslora != found.use_rslora {
        format!("has `use_rslora: {}`, the params say otherwise", found.use_rslora)
    } else if wanted.use_dora != found.use_dora {
        format!("has `use_dora: {}`, the params say otherwise", found.use_dora)
    } else if sorted(&wanted.targets) != sorted(&found.targets) {
        let [found, wanted] = [&found.targets, &wanted.targets].map(|t| t.join(", "));
        format!("adapts {found}; the params say {wanted}")
    } else {
        return Ok(());
    };
    let error = StageError::input(format!("the adapter of input `init_adapter` {fault}"));
    Err(error.help("set `lora` to what the adapter was trained with"))
}
