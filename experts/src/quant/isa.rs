//! Which instruction set runs, chosen once, and one plain source compiled for each of them.

use std::sync::OnceLock;

/// The instruction sets that have kernels of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// Plain Rust: any machine.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX2 and AVX-VNNI.
    Avx2Vnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// The same, and AMX with its int8 tiles.
    Amx,
    /// NEON and no more.
    Neon,
    /// NEON with `sdot`.
    DotProd,
    /// NEON with `sdot` and `smmla`.
    I8mm,
}

impl Isa {
    /// All of them; of those that one machine has, a later one is faster.
    pub(crate) const ALL: [Isa; 8] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::Avx2Vnni,
        Isa::Avx512,
        Isa::Amx,
        Isa::Neon,
        Isa::DotProd,
        Isa::I8mm,
    ];

    /// The best that this machine has.
    #[inline]
    pub(crate) fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Isa::ALL.into_iter().rfind(|isa| isa.is_here()).unwrap_or(Isa::Scalar))
    }

    /// Whether this machine has it.
    pub(crate) fn is_here(self) -> bool {
        #[cfg(target_arch = "aarch64")]
        use std::arch::is_aarch64_feature_detected;

        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Vnni => Isa::Avx2.is_here() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_here()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512.is_here() && super::avx512::amx::is_here(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::DotProd => Isa::Neon.is_here() && is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Isa::I8mm => Isa::DotProd.is_here() && is_aarch64_feature_detected!("i8mm"),
            _ => false,
        }
    }
}

/// Compiles one plain body for every instruction set and calls the best. The compiler vectorises each copy; Rust
/// never reorders or fuses float operations, so that all copies give the same bits.
macro_rules! multiversion {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)+) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::quant::isa::Isa;

                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                match Isa::best() {
                    // SAFETY: `Isa::best` found these instructions on this machine.
                    Isa::Avx512 | Isa::Amx => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 | Isa::Avx2Vnni => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            body($($arg),*)
        }
    )+};
}
pub(crate) use multiversion;
