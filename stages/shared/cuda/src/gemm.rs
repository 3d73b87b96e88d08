//! Matrix products through cuBLASLt, in row-major terms.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result as lt, sys};

use crate::device::{Device, WORKSPACE};
use crate::{CudaError, Dtype};

/// A matrix on the device, row-major with rows `ld` elements apart; `transposed` reads it the other
/// way round.
#[derive(Clone, Copy)]
pub(crate) struct View {
    pub(crate) ptr: u64,
    pub(crate) ld: usize,
    pub(crate) transposed: bool,
}

impl View {
    pub(crate) fn new(ptr: u64, ld: usize) -> Self {
        Self { ptr, ld, transposed: false }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

/// `D [m, n] = alpha A [m, k] B [k, n] + beta C [m, n] (+ bias [n])`.
#[derive(Clone, Copy)]
pub(crate) struct Gemm {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: View,
    pub(crate) b: View,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    /// Added with `beta`, laid out as `d`.
    pub(crate) c: u64,
    pub(crate) d: View,
    /// D and C in f32, whatever A and B are.
    pub(crate) f32_out: bool,
    /// Vector to add to every row, in the type of D; 0 for none.
    pub(crate) bias: u64,
}

impl Gemm {
    /// `D = A B`.
    pub(crate) fn new((m, n, k): (usize, usize, usize), a: View, b: View, d: View) -> Self {
        let (alpha, beta) = (1.0, 0.0);
        Self { m, n, k, a, b, alpha, beta, c: d.ptr, d, f32_out: false, bias: 0 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 6],
    flags: [bool; 5],
    alignments: [u32; 4],
}

#[derive(Clone, Copy)]
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algo: sys::cublasLtMatmulAlgo_t,
}

/// Plans by shape; they live as long as the process.
#[derive(Default)]
pub(crate) struct Plans(RefCell<HashMap<Key, Plan>>);

fn alignment(ptr: u64) -> u32 {
    1 << ptr.trailing_zeros().min(8)
}

impl Device {
    /// Runs a product. The algorithm is a function of shapes and alignments alone, so that results
    /// repeat.
    pub(crate) fn gemm(&self, class: &'static str, g: Gemm) -> Result<(), CudaError> {
        let key = Key {
            sizes: [g.m, g.n, g.k, g.a.ld, g.b.ld, g.d.ld],
            flags: [g.a.transposed, g.b.transposed, g.f32_out, g.bias != 0, g.beta != 0.0],
            alignments: [g.a.ptr, g.b.ptr, g.c, g.d.ptr].map(alignment),
        };
        let known = self.plans.0.borrow().get(&key).copied();
        let plan = match known {
            Some(plan) => plan,
            None => {
                let plan = self.plan(&g, &key)?;
                self.plans.0.borrow_mut().insert(key, plan);
                plan
            }
        };
        self.timed(class, || {
            // SAFETY: plan and operands fit each other by construction of the key.
            unsafe {
                if g.bias != 0 {
                    set(
                        plan.desc,
                        sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                        &g.bias,
                    )?;
                }
                let [first, second, out] = plan.layouts;
                lt::matmul(
                    self.blas,
                    plan.desc,
                    (&raw const g.alpha).cast(),
                    (&raw const g.beta).cast(),
                    g.b.ptr as *const c_void,
                    first,
                    g.a.ptr as *const c_void,
                    second,
                    g.c as *const c_void,
                    out,
                    g.d.ptr as *mut c_void,
                    out,
                    &raw const plan.algo,
                    self.workspace() as *mut c_void,
                    WORKSPACE as usize,
                    self.cu_stream().cast(),
                )?;
            }
            Ok(())
        })
    }

    /// cuBLASLt counts in columns: `Dᵀ = Bᵀ Aᵀ`, and a row-major matrix is its own transpose there.
    fn plan(&self, g: &Gemm, key: &Key) -> Result<Plan, CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let kind = |dtype: Dtype| match dtype {
            Dtype::F32 => sys::cudaDataType::CUDA_R_32F,
            Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Dtype::F16 => sys::cudaDataType::CUDA_R_16F,
        };
        let own = kind(self.dtype);
        let out = if g.f32_out { kind(Dtype::F32) } else { own };
        // SAFETY: handles are created here and kept; attributes have the sizes cuBLASLt documents.
        unsafe {
            let float = sys::cudaDataType::CUDA_R_32F;
            let desc = lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float)?;
            set(desc, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(g.b.transposed))?;
            set(desc, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(g.a.transposed))?;
            if g.bias != 0 {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                set(desc, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
                set(desc, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g.bias)?;
            }
            let layout = |dtype, rows: usize, columns: usize, view: View| {
                let (rows, columns) =
                    if view.transposed { (columns, rows) } else { (rows, columns) };
                lt::create_matrix_layout(dtype, columns as u64, rows as u64, view.ld as i64)
            };
            let first = layout(own, g.k, g.n, g.b)?;
            let second = layout(own, g.m, g.k, g.a)?;
            let third = layout(out, g.m, g.n, g.d)?;
            let preference = lt::create_matmul_pref()?;
            prefer(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                &(WORKSPACE as usize),
            )?;
            let names = [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ];
            for (name, bytes) in names.into_iter().zip(&key.alignments) {
                prefer(preference, name, bytes)?;
            }
            let found = lt::get_matmul_algo_heuristic(
                self.blas, desc, first, second, third, third, preference,
            );
            lt::destroy_matmul_pref(preference)?;
            Ok(Plan { desc, layouts: [first, second, third], algo: found?.algo })
        }
    }
}

/// # Safety
/// `value` is of the attribute's type.
unsafe fn set<V>(
    desc: sys::cublasLtMatmulDesc_t,
    name: sys::cublasLtMatmulDescAttributes_t,
    value: &V,
) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe {
        lt::set_matmul_desc_attribute(desc, name, (&raw const *value).cast(), size_of::<V>())?;
    }
    Ok(())
}

/// # Safety
/// `value` is of the attribute's type.
unsafe fn prefer<V>(
    preference: sys::cublasLtMatmulPreference_t,
    name: sys::cublasLtMatmulPreferenceAttributes_t,
    value: &V,
) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe {
        lt::set_matmul_pref_attribute(
            preference,
            name,
            (&raw const *value).cast(),
            size_of::<V>(),
        )?;
    }
    Ok(())
}
