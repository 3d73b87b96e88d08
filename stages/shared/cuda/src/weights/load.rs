//! A decoder's weights from a model folder.

use std::path::Path;

use checkpoint::{LINEAR, ModelConfig, ModelFolder, Variations, Weights};

use super::matrix::Matrix;
use super::{Frozen, Layer, Linear};
use crate::CudaError;
use crate::device::{Buffer, Device};
use crate::sizes::check_layers;

/// Reads weights and puts them on the device.
struct Loader<'a> {
    device: &'a Device,
    weights: &'a Weights<'a>,
    config: &'a ModelConfig,
}

fn wrong(error: checkpoint::CheckpointError) -> CudaError {
    CudaError::Input(error.to_string())
}

impl Frozen {
    /// Loads a model folder: four-bit weights as they are stored, others in the device's type.
    ///
    /// # Errors
    /// [`CudaError`] naming what is missing, or a size that the kernels do not serve.
    pub fn load(device: &Device, folder: &Path) -> Result<Self, CudaError> {
        let folder = ModelFolder::open(folder).map_err(wrong)?;
        let config = ModelConfig::read(&folder).map_err(wrong)?;
        check_layers(&config, device.dtype)?;
        let weights = Weights::open(&folder, &config).map_err(wrong)?;
        let loader = Loader { device, weights: &weights, config: &config };
        let untied = weights.has("lm_head.weight") && !config.tie_word_embeddings;
        let layers = (0..config.num_hidden_layers).map(|layer| loader.layer(layer));
        Ok(Self {
            layers: layers.collect::<Result<_, _>>()?,
            embed: loader.table("model.embed_tokens.weight")?,
            head: untied.then(|| loader.table("lm_head.weight")).transpose()?,
            norm: loader.norm("model.norm")?,
            config: config.clone(),
        })
    }
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, CudaError> {
        let (device, config) = (self.device, self.config);
        let prefix = format!("model.layers.{layer}");
        let mut linears = Vec::new();
        let mut bias: Vec<f32> = Vec::new();
        for (projection, name) in LINEAR.iter().enumerate() {
            let (inputs, outputs) = config.linear_shape(projection);
            let name = format!("{prefix}.{name}");
            let matrix = self.matrix(&format!("{name}.weight"), [outputs, inputs], true)?;
            linears.push(Linear::upload(device, &matrix, [outputs, inputs])?);
            if config.qkv_bias && projection < 3 {
                bias.extend(self.values(&format!("{name}.bias"), outputs)?);
            }
        }
        let bias = (!bias.is_empty()).then(|| device.upload(&device.dtype.encode(&bias)));
        let Variations { output_norms, .. } = config.variations;
        let before_feed_forward = if output_norms { "pre_feedforward" } else { "post_attention" };
        let norm = |name: &str| self.norm(&format!("{prefix}.{name}_layernorm"));
        let outputs = || Ok::<_, CudaError>([norm("post_attention")?, norm("post_feedforward")?]);
        Ok(Layer {
            input_norm: norm("input")?,
            feed_forward_norm: norm(before_feed_forward)?,
            output_norms: output_norms.then(outputs).transpose()?,
            linears,
            bias: bias.transpose()?,
        })
    }

    /// A row for every token.
    fn table(&self, name: &str) -> Result<Buffer, CudaError> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        self.matrix(name, shape, false)?.upload(self.device, shape)
    }

    fn norm(&self, name: &str) -> Result<Buffer, CudaError> {
        let mut weight = self.values(&format!("{name}.weight"), self.config.hidden_size)?;
        weight.iter_mut().for_each(|w| *w += self.config.variations.norm_offset);
        self.device.upload_f32(&weight)
    }

    fn values(&self, name: &str, count: usize) -> Result<Vec<f32>, CudaError> {
        self.weights.load(name, &[count]).map_err(wrong)
    }

    fn matrix(&self, name: &str, shape: [usize; 2], is_linear: bool) -> Result<Matrix, CudaError> {
        Matrix::read(self.weights, name, shape, is_linear).map_err(wrong)
    }
}
