//! The slow twin: the same decoder in plain Burn operations, differentiated by Burn's autodiff.
//!
//! Nothing here is fused, packed or hand-derived. Tests hold the fast path against it.

use burn::tensor::activation::{log_softmax, silu, softmax, tanh};
use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::Activation;
use kernels::dropout::dropout;

use crate::adapter::{Adapter, DropoutKey, Factor, GROUPS, PROJECTIONS};
use crate::decoder::{Layer, Model};
use crate::dora::Gain;
use crate::micro_step::{Loss, MicroBatch};

/// A pass over one batch on a device of Burn's.
struct Twin<'a> {
    model: &'a Model,
    device: Device,
    factors: Vec<TwinFactor<'a>>,
    scale: f32,
    cos: Tensor<2>,
    sin: Tensor<2>,
    /// By layer: 0 where a query may look, minus infinity elsewhere `[n, n]`.
    masks: Vec<Tensor<2>>,
    /// Probability and key of the dropout before the adapter.
    dropout: Option<(f32, DropoutKey)>,
}

/// One factor's tensors.
struct TwinFactor<'a> {
    factor: &'a Factor,
    a: Tensor<2>,
    b: Tensor<2>,
    /// Magnitudes and norms `[1, out]` with DoRA.
    dora: Option<(Tensor<2>, Tensor<2>)>,
}

/// Loss and gradient as [`Model::loss_and_grad`] gives them, without dropout, by autodiff.
pub fn loss_and_grad(
    model: &Model,
    adapter: &Adapter,
    batch: MicroBatch<'_>,
    scale: f32,
) -> (Loss, Vec<f32>) {
    loss_and_grad_with_dropout(model, adapter, batch, scale, None)
}

/// As [`loss_and_grad`], under the masks of that key.
pub fn loss_and_grad_with_dropout(
    model: &Model,
    adapter: &Adapter,
    batch: MicroBatch<'_>,
    scale: f32,
    dropout: Option<DropoutKey>,
) -> (Loss, Vec<f32>) {
    let device = Device::flex().autodiff();
    let mut twin = Twin::new(model, Some(adapter), batch.cu_seqlens, device);
    twin.dropout = dropout.map(|key| (adapter.config.dropout, key));
    let logits = twin.logits(batch.tokens);
    let rows: Vec<usize> = (0..batch.targets.len()).filter(|i| batch.targets[*i] != -100).collect();
    let indices: Vec<i32> = rows.iter().map(|r| *r as i32).collect();
    let targets: Vec<i32> = rows.iter().map(|r| batch.targets[*r]).collect();
    let log_p = log_softmax(logits.select(0, twin.int(indices)), 1);
    let picked = log_p.gather(1, twin.int(targets).reshape([rows.len() as i64, 1]));
    let sum = picked.sum().neg();
    let total: f32 = sum.clone().into_scalar();
    let grads = (sum * scale).backward();
    let mut grad = vec![0.0; adapter.values.len()];
    for TwinFactor { factor, a, b, dora } in &twin.factors {
        let magnitude = dora.as_ref().map(|(m, _)| (m, &factor.magnitude));
        for (tensor, range) in [(a, &factor.a), (b, &factor.b)].into_iter().chain(magnitude) {
            if let Some(g) = tensor.grad(&grads) {
                grad[range.clone()].copy_from_slice(&values(&g));
            }
        }
    }
    (Loss { sum: f64::from(total), targets: rows.len() as u64 }, grad)
}

/// Logits `[n, vocabulary]` as [`Model::logits`] gives them.
pub fn logits(
    model: &Model,
    adapter: Option<&Adapter>,
    tokens: &[i32],
    cu_seqlens: &[i32],
) -> Vec<f32> {
    values(&Twin::new(model, adapter, cu_seqlens, Device::flex()).logits(tokens))
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    let data = tensor.clone().into_data();
    data.as_slice::<f32>().expect("invariant: the twin computes in f32").to_vec()
}

impl<'a> Twin<'a> {
    fn new(
        model: &'a Model,
        adapter: Option<&'a Adapter>,
        cu_seqlens: &[i32],
        device: Device,
    ) -> Self {
        let tensor = |values: &[f32], shape: [usize; 2]| -> Tensor<2> {
            Tensor::from_data(TensorData::new(values.to_vec(), shape), &device)
        };
        let trained = |values: &[f32], shape: [usize; 2]| {
            let tensor = tensor(values, shape);
            if device.is_autodiff() { tensor.require_grad() } else { tensor }
        };
        let gains = adapter.map(|a| Gain::of(a, &model.pin())).unwrap_or_default();
        let factors = adapter.into_iter().flat_map(|adapter| {
            let r = adapter.config.r;
            adapter.factors.iter().enumerate().map(move |(index, f)| (index, f, r, adapter))
        });
        let factors = factors
            .map(|(index, factor, r, adapter)| TwinFactor {
                factor,
                a: trained(&adapter.values[factor.a.clone()], [r, factor.inputs]),
                b: trained(&adapter.values[factor.b.clone()], [factor.outputs, r]),
                dora: gains.get(index).map(|gain| {
                    let magnitudes = &adapter.values[factor.magnitude.clone()];
                    let shape = [1, factor.outputs];
                    (trained(magnitudes, shape), tensor(&gain.norms, shape))
                }),
            })
            .collect();
        let c = model.config();
        let segment = segments(cu_seqlens);
        let n = segment.len();
        let angle = |i: usize, j: usize| {
            let frequency = 1.0 / c.rope_theta.powf(2.0 * j as f32 / c.head_dim as f32);
            segment[i].1 as f32 * frequency
        };
        let half = c.head_dim / 2;
        let table = |f: fn(f32) -> f32| -> Vec<f32> {
            (0..n)
                .flat_map(|i| (0..c.head_dim).map(move |j| (i, j % half)))
                .map(|(i, j)| f(angle(i, j)))
                .collect()
        };
        let hidden = |i: usize, j: usize, window: usize| {
            segment[i].0 != segment[j].0 || j > i || i - j >= window
        };
        let mask = |layer: usize| {
            let window = c.sliding_window(layer).unwrap_or(usize::MAX);
            let value = |at: usize| {
                if hidden(at / n, at % n, window) { f32::NEG_INFINITY } else { 0.0 }
            };
            tensor(&(0..n * n).map(value).collect::<Vec<f32>>(), [n, n])
        };
        Self {
            model,
            factors,
            scale: adapter.map_or(0.0, Adapter::scale),
            cos: tensor(&table(f32::cos), [n, c.head_dim]),
            sin: tensor(&table(f32::sin), [n, c.head_dim]),
            masks: (0..c.num_hidden_layers).map(mask).collect(),
            dropout: None,
            device,
        }
    }

    fn int(&self, values: Vec<i32>) -> Tensor<1, Int> {
        let len = values.len();
        Tensor::from_data(TensorData::new(values, [len]), &self.device)
    }

    /// A frozen weight on the twin's device.
    fn frozen<const D: usize>(&self, tensor: &Tensor<D>) -> Tensor<D> {
        if self.device.is_autodiff() { tensor.clone().autodiff() } else { tensor.clone() }
    }

    fn logits(&self, tokens: &[i32]) -> Tensor<2> {
        let mut x =
            self.frozen(&self.model.embed_tokens.tensor()).select(0, self.int(tokens.to_vec()));
        let variations = &self.model.config().variations;
        if let Some(factor) = variations.embedding_scale {
            x = x * factor;
        }
        for (index, layer) in self.model.layers.iter().enumerate() {
            x = self.layer(index, layer, x);
        }
        let x = self.norm(x, &self.model.norm);
        let logits = x.matmul(self.frozen(&self.model.head().tensor()).transpose());
        match variations.final_logit_softcapping {
            Some(cap) => tanh(logits / cap) * cap,
            None => logits,
        }
    }

    fn layer(&self, index: usize, layer: &Layer, x: Tensor<2>) -> Tensor<2> {
        let c = self.model.config();
        let h = self.norm(x.clone(), &layer.input_layernorm);
        let q =
            self.rotate(self.heads(self.linear(index, layer, 0, h.clone()), c.num_attention_heads));
        let k =
            self.rotate(self.heads(self.linear(index, layer, 1, h.clone()), c.num_key_value_heads));
        let v = self.heads(self.linear(index, layer, 2, h), c.num_key_value_heads);
        let group = c.num_attention_heads / c.num_key_value_heads;
        let (k, v) = (repeat_heads(k, group), repeat_heads(v, group));
        let mut scores = q.matmul(k.swap_dims(1, 2)) * c.attention_scale();
        if let Some(cap) = c.variations.attn_logit_softcapping {
            scores = tanh(scores / cap) * cap;
        }
        let weights = softmax(scores + self.masks[index].clone().unsqueeze::<3>(), 2);
        let [n, _] = x.dims();
        let width = c.num_attention_heads * c.head_dim;
        let attended = weights.matmul(v).swap_dims(0, 1).reshape([n, width]);
        let output = self.linear(index, layer, 3, attended);
        let x = x + self.output_norm(output, layer.attention_output_norm.as_ref());
        let h = self.norm(x.clone(), &layer.feed_forward_norm);
        let gate = self.linear(index, layer, 4, h.clone());
        let up = self.linear(index, layer, 5, h);
        let gate = match c.variations.activation {
            Activation::Silu => silu(gate),
            Activation::GeluTanh => gelu_tanh(gate),
        };
        let output = self.linear(index, layer, 6, gate * up);
        x + self.output_norm(output, layer.feed_forward_output_norm.as_ref())
    }

    fn output_norm(&self, output: Tensor<2>, weight: Option<&Tensor<1>>) -> Tensor<2> {
        match weight {
            Some(weight) => self.norm(output, weight),
            None => output,
        }
    }

    /// `g ⊙ (x·Wᵀ + scale · (x·Aᵀ)·Bᵀ) + bias`; `g` is 1 without DoRA.
    fn linear(&self, index: usize, layer: &Layer, projection: usize, x: Tensor<2>) -> Tensor<2> {
        let mut y =
            x.clone().matmul(self.frozen(&layer.projections[projection].tensor()).transpose());
        let name = PROJECTIONS[projection];
        let adapted = self
            .factors
            .iter()
            .find(|f| f.factor.layer == index && f.factor.name.rsplit('.').next() == Some(name));
        if let Some(TwinFactor { a, b, dora, .. }) = adapted {
            let low = self.dropped(x, index, projection).matmul(a.clone().transpose());
            y = y + low.matmul(b.clone().transpose()) * self.scale;
            if let Some((magnitudes, norms)) = dora {
                y = y * (magnitudes.clone() / norms.clone());
            }
        }
        if let Some(bias) = &layer.biases[projection] {
            y = y + self.frozen(bias).unsqueeze::<2>();
        }
        y
    }

    /// `x` under the mask of its layer and group of projections.
    fn dropped(&self, x: Tensor<2>, layer: usize, projection: usize) -> Tensor<2> {
        let Some((probability, key)) = self.dropout else { return x };
        let group = GROUPS.iter().position(|g| g.contains(&projection)).unwrap_or_default();
        let [n, width] = x.dims();
        let mut mask = vec![1.0; n * width];
        dropout(&mut mask, probability, key.of(layer, group));
        x * Tensor::from_data(TensorData::new(mask, [n, width]), &self.device)
    }

    fn norm(&self, x: Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
        let eps = self.model.config().rms_norm_eps;
        let rms = (x.clone().powf_scalar(2.0).mean_dim(1) + eps).sqrt();
        x / rms * self.frozen(weight).unsqueeze::<2>()
    }

    /// `[n, heads * d]` to `[heads, n, d]`.
    fn heads(&self, x: Tensor<2>, heads: usize) -> Tensor<3> {
        let [n, _] = x.dims();
        x.reshape([n, heads, self.model.config().head_dim]).swap_dims(0, 1)
    }

    /// `x * cos + rotate_half(x) * sin`.
    fn rotate(&self, x: Tensor<3>) -> Tensor<3> {
        let half = self.model.config().head_dim / 2;
        let low = x.clone().narrow(2, 0, half);
        let high = x.clone().narrow(2, half, half);
        let turned = Tensor::cat(vec![high.neg(), low], 2);
        x * self.cos.clone().unsqueeze::<3>() + turned * self.sin.clone().unsqueeze::<3>()
    }
}

/// GELU by its approximation with tanh.
fn gelu_tanh(x: Tensor<2>) -> Tensor<2> {
    let root = (2.0 / std::f32::consts::PI).sqrt();
    let inner = (x.clone() + x.clone().powf_scalar(3.0) * 0.044_715) * root;
    x * 0.5 * (tanh(inner) + 1.0)
}

/// Segment and position of every token.
fn segments(cu_seqlens: &[i32]) -> Vec<(usize, u32)> {
    let bounds = cu_seqlens.windows(2).enumerate();
    bounds.flat_map(|(s, w)| (0..(w[1] - w[0]) as u32).map(move |p| (s, p))).collect()
}

/// `[kv_heads, n, d]` to `[kv_heads * group, n, d]`, each head repeated.
fn repeat_heads(x: Tensor<3>, group: usize) -> Tensor<3> {
    let [kv, n, d] = x.dims();
    x.reshape([kv, 1, n, d]).repeat_dim(1, group).reshape([kv * group, n, d])
}
