//! Params of the kind, under the names of transformers, TRL and PEFT where these have one.

use contract::{ParamError, parse_params};
use model::{DeviceChoice, DtypeChoice, Init, LoraConfig, PROJECTIONS};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::optimizer::{AdamConfig, OptimizerKind};
use crate::schedule::ScheduleKind;

/// Steps where neither `max_steps` nor `epochs` is given: the assignment's.
const DEFAULT_STEPS: u64 = 120;

/// What may be written under `params:`. The defaults are the assignment's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Params {
    /// The adapter.
    pub(crate) lora: Lora,
    /// Optimiser steps; exclusive with `epochs`. 120 where neither is given.
    #[schemars(range(min = 1))]
    pub(crate) max_steps: Option<u64>,
    /// Passes over the rows, which may end in the middle of one.
    pub(crate) epochs: Option<f64>,
    /// Highest learning rate, reached after the warmup.
    pub(crate) learning_rate: f64,
    /// Steps over which the learning rate rises from zero.
    pub(crate) warmup_steps: u64,
    pub(crate) schedule: ScheduleKind,
    /// Decoupled weight decay of the factors.
    #[schemars(range(min = 0))]
    pub(crate) weight_decay: f64,
    /// Packed rows a micro-batch.
    #[schemars(range(min = 1))]
    pub(crate) batch_size: usize,
    /// Micro-batches a step.
    #[schemars(range(min = 1))]
    pub(crate) gradient_accumulation: usize,
    /// Global L2 norm above which gradients are scaled down; 0 for none.
    #[schemars(range(min = 0))]
    pub(crate) max_grad_norm: f64,
    pub(crate) optimizer: OptimizerKind,
    /// Decay of the running means of gradients and of their squares.
    pub(crate) betas: [f64; 2],
    /// Added to the root of the second moment.
    pub(crate) eps: f64,
    /// Of the new adapter, the order of rows and dropout.
    pub(crate) seed: u64,
    /// Steps between two evaluations on `eval_tokens`; one more follows the last step.
    #[schemars(range(min = 1))]
    pub(crate) eval_steps: u64,
    /// Steps between two checkpoints for resuming.
    #[schemars(range(min = 1))]
    pub(crate) checkpoint_steps: u64,
    pub(crate) select: Select,
    /// When a rising loss ends the run; `null` for never.
    pub(crate) spike: Option<Spike>,
    /// Written to the adapter's `base_model_name_or_path`.
    pub(crate) base_model_name_or_path: String,
    pub(crate) device: DeviceChoice,
    pub(crate) dtype: DtypeChoice,
    pub(crate) activations: Activations,
}

/// The adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Lora {
    /// Rank.
    #[schemars(range(min = 1))]
    pub(crate) r: usize,
    /// What the adapter adds is scaled by `alpha / r`.
    pub(crate) alpha: f64,
    /// Share of the adapter's inputs that training sets to zero.
    #[schemars(range(min = 0, max = 1))]
    pub(crate) dropout: f64,
    /// Projections of every layer that get an adapter.
    #[schemars(extend("items" = {"type": "string", "enum": PROJECTIONS}))]
    pub(crate) targets: Vec<String>,
    /// Scale by `alpha / √r` instead of `alpha / r`.
    pub(crate) use_rslora: bool,
    /// Every output feature has a magnitude of its own (DoRA).
    pub(crate) use_dora: bool,
    /// What a new adapter holds.
    pub(crate) init: Init,
    /// Iterations of `init: loftq`; 1 where that is asked for without a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) loftq_iter: Option<u32>,
}

/// Which adapter is the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Select {
    /// The one after the last step.
    Last,
    /// The one with the lowest evaluation loss, the earliest of equals.
    Best,
}

/// A loss above `factor` times the running median for `patience` steps in a row ends the run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Spike {
    /// Times the running median.
    pub(crate) factor: f64,
    /// Steps in a row.
    #[schemars(range(min = 1))]
    pub(crate) patience: u64,
}

/// What the forward pass keeps on a GPU; the results are the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Activations {
    /// As `keep` where that fits, else as `recompute`, else as `offload`.
    Auto,
    /// Everything; weights decoded, too, where they take no more than half of what is left then.
    Keep,
    /// Each layer's input; layers run forward twice.
    Recompute,
    /// As `recompute`, with the inputs in pinned memory of the host.
    Offload,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            lora: Lora::default(),
            max_steps: None,
            epochs: None,
            learning_rate: 2e-4,
            warmup_steps: 10,
            schedule: ScheduleKind::Linear,
            weight_decay: 0.01,
            batch_size: 2,
            gradient_accumulation: 4,
            max_grad_norm: 1.0,
            optimizer: OptimizerKind::Adamw,
            betas: [0.9, 0.999],
            eps: 1e-8,
            seed: 42,
            eval_steps: 50,
            checkpoint_steps: 10,
            select: Select::Last,
            spike: Some(Spike::default()),
            base_model_name_or_path: String::new(),
            device: DeviceChoice::Auto,
            dtype: DtypeChoice::Auto,
            activations: Activations::Auto,
        }
    }
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            r: 16,
            alpha: 16.0,
            dropout: 0.0,
            targets: PROJECTIONS.map(str::to_owned).to_vec(),
            use_rslora: false,
            use_dora: false,
            init: Init::default(),
            loftq_iter: None,
        }
    }
}

impl Default for Spike {
    fn default() -> Self {
        Self { factor: 3.0, patience: 5 }
    }
}

impl Params {
    /// Parses, fills defaults in and checks every value.
    pub(crate) fn parse(params: &Value) -> Result<Self, ParamError> {
        let mut parsed: Self = parse_params(params)?;
        if parsed.max_steps.is_some() && parsed.epochs.is_some() {
            return Err(ParamError::at("epochs", "give `max_steps` or `epochs`, not both"));
        }
        if parsed.max_steps.is_none() && parsed.epochs.is_none() {
            parsed.max_steps = Some(DEFAULT_STEPS);
        }
        parsed.check_numbers()?;
        parsed.check_targets()?;
        parsed.check_dora()?;
        parsed.check_loftq()?;
        Ok(parsed)
    }

    fn check_loftq(&mut self) -> Result<(), ParamError> {
        let fault = match (self.lora.init, self.lora.loftq_iter) {
            (Init::Loftq, Some(0)) => "must be at least 1",
            (Init::Loftq, given) => {
                self.lora.loftq_iter = Some(given.unwrap_or(1));
                return Ok(());
            }
            (_, None) => return Ok(()),
            (_, Some(_)) => "goes with `init: loftq` alone",
        };
        Err(ParamError::at("lora.loftq_iter", fault))
    }

    /// Refuses what DoRA does not go with.
    fn check_dora(&self) -> Result<(), ParamError> {
        let fault = match &self.lora {
            Lora { use_dora: false, .. } => return Ok(()),
            Lora { init: Init::Pissa, .. } => "`init: pissa`",
            Lora { dropout, .. } if *dropout > 0.0 => "a dropout above 0",
            _ => return Ok(()),
        };
        Err(ParamError::at("lora.use_dora", format!("does not go with {fault}")))
    }

    fn check_numbers(&self) -> Result<(), ParamError> {
        let positive = |v: f64| v.is_finite() && v > 0.0;
        let not_negative = |v: f64| v.is_finite() && v >= 0.0;
        let fraction = |v: f64| (0.0..1.0).contains(&v);
        let spike = self.spike.unwrap_or_default();
        let rules = [
            ("lora.r", self.lora.r > 0, "at least 1"),
            ("lora.alpha", positive(self.lora.alpha), "greater than 0"),
            ("lora.dropout", fraction(self.lora.dropout), "at least 0 and less than 1"),
            ("max_steps", self.max_steps != Some(0), "at least 1"),
            ("epochs", self.epochs.is_none_or(positive), "greater than 0"),
            ("learning_rate", positive(self.learning_rate), "greater than 0"),
            ("weight_decay", not_negative(self.weight_decay), "at least 0"),
            ("batch_size", self.batch_size > 0, "at least 1"),
            ("gradient_accumulation", self.gradient_accumulation > 0, "at least 1"),
            ("max_grad_norm", not_negative(self.max_grad_norm), "at least 0"),
            ("betas", self.betas.into_iter().all(fraction), "at least 0 and less than 1"),
            ("eps", positive(self.eps), "greater than 0"),
            ("eval_steps", self.eval_steps > 0, "at least 1"),
            ("checkpoint_steps", self.checkpoint_steps > 0, "at least 1"),
            ("spike.factor", spike.factor.is_finite() && spike.factor > 1.0, "greater than 1"),
            ("spike.patience", spike.patience > 0, "at least 1"),
        ];
        match rules.into_iter().find(|(_, holds, _)| !holds) {
            Some((path, _, rule)) => Err(ParamError::at(path, format!("must be {rule}"))),
            None => Ok(()),
        }
    }

    fn check_targets(&self) -> Result<(), ParamError> {
        let targets = &self.lora.targets;
        if targets.is_empty() {
            return Err(ParamError::at("lora.targets", "needs at least one projection"));
        }
        for (i, target) in targets.iter().enumerate() {
            let path = format!("lora.targets.{i}");
            if !PROJECTIONS.contains(&target.as_str()) {
                let mut error = ParamError::at(&path, format!("unknown projection `{target}`"));
                error.expected = PROJECTIONS.map(str::to_owned).to_vec();
                return Err(error);
            }
            if targets[..i].contains(target) {
                return Err(ParamError::at(&path, format!("`{target}` is named twice")));
            }
        }
        Ok(())
    }

    /// All params, defaults filled in.
    pub(crate) fn to_value(&self) -> Value {
        serde_json::to_value(self).expect("invariant: params are plain data")
    }

    /// What can change the outputs: how often to save and when to give up cannot.
    pub(crate) fn identity(&self) -> Value {
        let mut value = Self { device: self.device.identity(), ..self.clone() }.to_value();
        if let Some(map) = value.as_object_mut() {
            map.shift_remove("checkpoint_steps");
            map.shift_remove("spike");
            map.shift_remove("activations");
        }
        value
    }

    /// The adapter's shape as the model takes it.
    pub(crate) fn lora_config(&self) -> LoraConfig {
        LoraConfig {
            r: self.lora.r,
            alpha: self.lora.alpha as f32,
            dropout: self.lora.dropout as f32,
            targets: self.lora.targets.clone(),
            use_rslora: self.lora.use_rslora,
            use_dora: self.lora.use_dora,
            loftq_iter: None,
        }
    }

    /// The optimiser's constants.
    pub(crate) fn adam(&self) -> AdamConfig {
        AdamConfig {
            kind: self.optimizer,
            betas: self.betas,
            eps: self.eps,
            weight_decay: self.weight_decay,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn defaults_are_the_assignments_and_parse_back() {
        let filled = Params::parse(&Value::Null).unwrap();
        assert_eq!(filled.max_steps, Some(120));
        assert_eq!(filled.lora.targets.len(), 7);
        assert_eq!(Params::parse(&filled.to_value()).unwrap(), filled);
        let by_epoch = Params::parse(&json!({"epochs": 1.5})).unwrap();
        assert_eq!(by_epoch.max_steps, None);
        assert_eq!(Params::parse(&by_epoch.to_value()).unwrap(), by_epoch);
    }

    #[test]
    fn saving_more_often_or_giving_up_later_is_the_same_run() {
        let identity = |v: Value| Params::parse(&v).unwrap().identity();
        let base = identity(json!({}));
        assert_eq!(base, identity(json!({"checkpoint_steps": 3, "spike": null})));
        for activations in ["keep", "recompute", "offload"] {
            assert_eq!(base, identity(json!({"activations": activations})));
        }
        assert_eq!(identity(json!({"device": "cuda"})), identity(json!({"device": "cuda:0"})));
        assert_ne!(base, identity(json!({"eval_steps": 3})));
    }

    #[test]
    fn wrong_values_name_their_path() {
        let path = |v: Value| Params::parse(&v).unwrap_err().path.join(".");
        assert_eq!(path(json!({"lora": {"r": 0}})), "lora.r");
        assert_eq!(path(json!({"lora": {"targets": ["q_proj", "qproj"]}})), "lora.targets.1");
        assert_eq!(path(json!({"lora": {"targets": ["q_proj", "q_proj"]}})), "lora.targets.1");
        assert_eq!(path(json!({"max_steps": 3, "epochs": 1})), "epochs");
        assert_eq!(path(json!({"betas": [0.9, 1.0]})), "betas");
        assert_eq!(path(json!({"spike": {"factor": 0.5}})), "spike.factor");
        assert_eq!(path(json!({"optimizer": "sgd"})), "optimizer");
        assert_eq!(path(json!({"learning_rat": 1})), "learning_rat");
        assert_eq!(path(json!({"device": "tpu"})), "device");
        let dora = |key: &str, value: Value| json!({"lora": {"use_dora": true, key: value}});
        assert_eq!(path(dora("dropout", json!(0.1))), "lora.use_dora");
        assert_eq!(path(dora("init", json!("pissa"))), "lora.use_dora");
        let loftq = |init: &str, n: u32| json!({"lora": {"init": init, "loftq_iter": n}});
        assert_eq!(path(loftq("loftq", 0)), "lora.loftq_iter");
        assert_eq!(path(loftq("pissa", 1)), "lora.loftq_iter");
    }
}
