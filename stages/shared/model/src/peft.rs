//! Adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::adapter::{Adapter, LoraConfig};
use crate::{Model, ModelConfig, ModelError};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const MAGNITUDE: &str = "lora_magnitude_vector";

/// The fields of PEFT's LoRA configuration that change what the adapter computes.
#[derive(Deserialize)]
struct PeftConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    lora_dropout: f32,
    target_modules: Vec<String>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    rank_pattern: HashMap<String, usize>,
    #[serde(default)]
    alpha_pattern: HashMap<String, f32>,
    #[serde(default)]
    bias: Option<String>,
    /// A name, or a switch.
    #[serde(default)]
    init_lora_weights: Value,
    #[serde(default)]
    loftq_config: Option<LoftqConfig>,
    /// Every other field: those that change what is computed are refused.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// How LoftQ quantised the weights.
#[derive(Deserialize)]
#[serde(default)]
struct LoftqConfig {
    loftq_bits: u32,
    loftq_iter: u32,
}

impl Default for LoftqConfig {
    fn default() -> Self {
        Self { loftq_bits: 4, loftq_iter: 1 }
    }
}

/// Fields that must not be set, since this reader would compute something else.
const REFUSED: [&str; 12] = [
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
    "kasa_config",
];

impl Adapter {
    /// Writes a folder that PEFT loads. `base` is the value of `base_model_name_or_path`. The
    /// folder must not exist or be empty; factors are stored in f32.
    ///
    /// # Errors
    /// [`ModelError::Io`] when the disk refuses.
    pub fn save_peft(&self, folder: &Path, base: &str) -> Result<(), ModelError> {
        fs::create_dir_all(folder).map_err(|e| ModelError::io("create", folder, e))?;
        // PEFT repeats LoftQ on the weights that it loads such an adapter onto.
        let (init, loftq) = match self.config.loftq_iter {
            Some(iterations) => {
                (json!("loftq"), json!({"loftq_bits": 4, "loftq_iter": iterations}))
            }
            None => (json!(true), json!({})),
        };
        let config = json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": init,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": loftq,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.config.r,
            "rank_pattern": {},
            "revision": null,
            "target_modules": self.config.targets,
            "task_type": "CAUSAL_LM",
            "use_dora": self.config.use_dora,
            "use_rslora": self.config.use_rslora,
        });
        let path = folder.join(CONFIG);
        let mut text = serde_json::to_vec_pretty(&config)
            .map_err(|e| ModelError::Input(format!("adapter configuration: {e}")))?;
        text.push(b'\n');
        fs::write(&path, text).map_err(|e| ModelError::io("write", &path, e))?;
        let path = folder.join(WEIGHTS);
        fs::write(&path, self.serialize()?).map_err(|e| ModelError::io("write", &path, e))
    }

    fn serialize(&self) -> Result<Vec<u8>, ModelError> {
        let r = self.config.r;
        let mut parts: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        for f in &self.factors {
            let a = bytes(&self.values[f.a.clone()]);
            let b = bytes(&self.values[f.b.clone()]);
            parts.push((tensor_name(&f.name, "lora_A.weight"), vec![r, f.inputs], a));
            parts.push((tensor_name(&f.name, "lora_B.weight"), vec![f.outputs, r], b));
            if self.config.use_dora {
                let m = bytes(&self.values[f.magnitude.clone()]);
                parts.push((tensor_name(&f.name, MAGNITUDE), vec![f.outputs], m));
            }
        }
        let fault = |e: safetensors::SafeTensorError| ModelError::Input(format!("adapter: {e}"));
        let views = parts
            .iter()
            .map(|(name, shape, data)| {
                let view = TensorView::new(Dtype::F32, shape.clone(), data).map_err(fault)?;
                Ok((name.as_str(), view))
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        // One key at most: the map has no order, and the file's bytes are its identity.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(views, Some(metadata)).map_err(fault)
    }

    /// Reads a PEFT folder for `model`. An adapter that PEFT started as PiSSA belongs to what that
    /// left of the weights, and comes back as one of twice the rank for the whole weights.
    ///
    /// # Errors
    /// [`ModelError`] naming the field or tensor that is missing, misshapen or not supported
    /// (rank patterns, trained biases or modules); also for an adapter that LoftQ started, which
    /// [`Model::load_adapter`] reads.
    pub fn load_peft(folder: &Path, model: &Model) -> Result<Self, ModelError> {
        let config = PeftConfig::read(folder)?;
        if config.loftq_iter().is_some() {
            return Err(of_loftq(folder));
        }
        Self::read_for(folder, &config, model)
    }

    fn read_for(folder: &Path, config: &PeftConfig, model: &Model) -> Result<Self, ModelError> {
        let adapter = Self::read_factors(folder, config, model.config())?;
        if config.is_pissa() {
            let start = Self::pissa(model, &adapter.config)?;
            return adapter.relative_to(&start, model);
        }
        Ok(adapter)
    }

    /// As [`Adapter::load_peft`], for a model that is not loaded.
    ///
    /// # Errors
    /// As [`Adapter::load_peft`]; also for an adapter that PEFT started as PiSSA.
    pub fn load_peft_of(folder: &Path, model: &ModelConfig) -> Result<Self, ModelError> {
        let adapter = Self::load_peft_to_merge(folder, model)?;
        if adapter.config.loftq_iter.is_some() { Err(of_loftq(folder)) } else { Ok(adapter) }
    }

    /// As [`Adapter::load_peft_of`], also for an adapter that LoftQ started: [`Adapter::merge`]
    /// quantises what it is merged onto.
    ///
    /// # Errors
    /// As [`Adapter::load_peft_of`], but for LoftQ.
    pub fn load_peft_to_merge(folder: &Path, model: &ModelConfig) -> Result<Self, ModelError> {
        let config = PeftConfig::read(folder)?;
        if config.is_pissa() {
            return Err(ModelError::Input(format!(
                "{}: an adapter for what PiSSA left of the weights; save it from PEFT with \
                 `path_initial_model_for_weight_conversion`",
                folder.join(CONFIG).display()
            )));
        }
        Self::read_factors(folder, &config, model)
    }

    fn read_factors(
        folder: &Path,
        config: &PeftConfig,
        model: &ModelConfig,
    ) -> Result<Self, ModelError> {
        let lora = LoraConfig {
            r: config.r,
            alpha: config.lora_alpha,
            dropout: config.lora_dropout,
            targets: config.target_modules.clone(),
            use_rslora: config.use_rslora,
            use_dora: config.use_dora,
            loftq_iter: config.loftq_iter(),
        };
        let path = folder.join(WEIGHTS);
        let raw = fs::read(&path).map_err(|e| ModelError::io("read", &path, e))?;
        let fault = |message: String| ModelError::Input(format!("{}: {message}", path.display()));
        let file = SafeTensors::deserialize(&raw).map_err(|e| fault(e.to_string()))?;
        // Before anything of that size is made: the file bounds what the rank can truly be.
        let factors = file.iter().filter(|(name, _)| name.ends_with("lora_A.weight"));
        let ranks: Vec<_> = factors.map(|(_, view)| view.shape().first().copied()).collect();
        if ranks.is_empty() || ranks.iter().any(|rank| *rank != Some(lora.r)) {
            let message = format!("its factors are not of the rank {} of {CONFIG}", lora.r);
            return Err(fault(message));
        }
        let of_config =
            |e: ModelError| ModelError::Input(format!("{}: {e}", folder.join(CONFIG).display()));
        let mut adapter = Self::zeros(model, &lora).map_err(of_config)?;
        let Self { factors, values, .. } = &mut adapter;
        let mut used = 0;
        for f in factors.iter() {
            let wanted = [
                ("lora_A.weight", &f.a, vec![lora.r, f.inputs]),
                ("lora_B.weight", &f.b, vec![f.outputs, lora.r]),
                (MAGNITUDE, &f.magnitude, vec![f.outputs]),
            ];
            for (which, range, shape) in wanted.into_iter().filter(|(_, r, _)| !r.is_empty()) {
                let name = tensor_name(&f.name, which);
                let view = file.tensor(&name).map_err(|e| fault(format!("{name}: {e}")))?;
                if view.shape() != shape {
                    let found = view.shape();
                    return Err(fault(format!("{name} is {found:?}, expected {shape:?}")));
                }
                let read = checkpoint::to_f32(view.dtype(), view.data())
                    .ok_or_else(|| fault(format!("{name} has type {:?}", view.dtype())))?;
                values[range.clone()].copy_from_slice(&read);
                used += 1;
            }
        }
        if file.len() != used {
            return Err(fault(format!("{} tensors, of which {used} are known", file.len())));
        }
        Ok(adapter)
    }
}

impl Model {
    /// Reads a PEFT folder as [`Adapter::load_peft`] does. Where LoftQ started the adapter, the
    /// weights under it are quantised first, as PEFT does.
    ///
    /// # Errors
    /// As [`Adapter::load_peft`], but for LoftQ.
    pub fn load_adapter(&mut self, folder: &Path) -> Result<Adapter, ModelError> {
        let adapter = Adapter::read_for(folder, &PeftConfig::read(folder)?, self)?;
        self.follow_loftq(&adapter)?;
        Ok(adapter)
    }
}

impl PeftConfig {
    /// Iterations of LoftQ, where it started the adapter.
    fn loftq_iter(&self) -> Option<u32> {
        let started = self.init_lora_weights == "loftq";
        started.then(|| self.loftq_config.as_ref().map_or(1, |c| c.loftq_iter))
    }

    fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(CONFIG);
        let text = fs::read(&path).map_err(|e| ModelError::io("read", &path, e))?;
        let config: Self = serde_json::from_slice(&text)
            .map_err(|e| ModelError::Input(format!("{}: {e}", path.display())))?;
        config.refuse_unsupported(&path)?;
        Ok(config)
    }

    fn is_pissa(&self) -> bool {
        self.init_lora_weights == "pissa"
    }

    /// The start, where it changed the weights in a way that cannot be repeated here.
    fn unknown_start(&self) -> Option<&str> {
        let known = ["gaussian", "pissa", "loftq", "eva", "orthogonal"];
        self.init_lora_weights.as_str().filter(|name| !known.contains(name))
    }

    /// The first field that is set and must not be.
    fn refused_field(&self) -> Option<&'static str> {
        let is_set = |name: &&str| match self.others.get(*name) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(_) => true,
        };
        REFUSED.into_iter().find(is_set)
    }

    fn refuse_unsupported(&self, path: &Path) -> Result<(), ModelError> {
        let biased = self.bias.as_deref().is_some_and(|b| b != "none");
        let saved = self.modules_to_save.as_ref().is_some_and(|m| !m.is_empty());
        let fault = if self.peft_type != "LORA" {
            format!("peft_type `{}`", self.peft_type)
        } else if self.fan_in_fan_out {
            "fan_in_fan_out".to_owned()
        } else if biased {
            "a trained bias".to_owned()
        } else if saved {
            "modules_to_save".to_owned()
        } else if !self.rank_pattern.is_empty() || !self.alpha_pattern.is_empty() {
            "rank_pattern or alpha_pattern".to_owned()
        } else if self.use_dora && self.is_pissa() {
            "use_dora together with init_lora_weights `pissa`".to_owned()
        } else if self.loftq_iter().is_some()
            && self.loftq_config.as_ref().is_some_and(|c| c.loftq_bits != 4 || c.loftq_iter == 0)
        {
            "LoftQ in other than 4 bits".to_owned()
        } else if let Some(start) = self.unknown_start() {
            format!("init_lora_weights `{start}`")
        } else if let Some(field) = self.refused_field() {
            field.to_owned()
        } else {
            return Ok(());
        };
        Err(ModelError::Input(format!("{}: {fault} is not supported", path.display())))
    }
}

/// The refusal of an adapter whose weights would have to be quantised as LoftQ did.
fn of_loftq(folder: &Path) -> ModelError {
    ModelError::Input(format!(
        "{}: an adapter for weights that LoftQ quantised, which is not repeated on a GPU: set \
         `device: cpu`",
        folder.join(CONFIG).display()
    ))
}

fn tensor_name(projection: &str, factor: &str) -> String {
    format!("base_model.model.{projection}.{factor}")
}
