//! Names into addresses, once for each connection: what is judged here is what is dialled.
//!
//! Which hosts may be reached at all, [`Destinations`] says, from the name alone. A name says nothing of where it
//! leads, and may lead elsewhere with each question: so only the addresses that were looked at are handed on.

pub use crate::model::destination::{Destinations, Ports, Reach, Target};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use url::Host;

/// Why a host is not connected to.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("{0} is not among the hosts that are allowed")]
    NotAllowed(String),
    #[error("{0} has no public address, and is not allowed by its own name")]
    NotPublic(String),
    #[error("the name {name} cannot be looked up")]
    Unknown { name: String, source: io::Error },
}

type Lookup = dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync;

/// Who is asked for the addresses of a name.
#[derive(Clone)]
pub struct Names(Arc<Lookup>);

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Names")
    }
}

impl Default for Names {
    /// The system's resolver.
    fn default() -> Self {
        Self::new(|name| {
            async move { Ok(tokio::net::lookup_host((name, 0)).await?.map(|address| address.ip()).collect()) }.boxed()
        })
    }
}

impl Names {
    /// Another one than the system's: it is asked once for each connection, and nobody after it.
    pub fn new(lookup: impl Fn(String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(lookup))
    }

    /// The addresses of a name that are within reach, at least one. Dial these, and do not look the name up again.
    ///
    /// # Errors
    /// [`Refused::Unknown`] where it has no address, [`Refused::NotPublic`] where none of them is within reach.
    pub async fn addresses(&self, name: &str, reach: Reach) -> Result<Vec<IpAddr>, Refused> {
        let unknown = |source| Refused::Unknown { name: name.to_owned(), source };
        let found = self.0(name.to_owned()).await.map_err(unknown)?;
        if found.is_empty() {
            return Err(unknown(io::ErrorKind::NotFound.into()));
        }
        let within: Vec<_> = found.into_iter().filter(|address| reach.includes(*address)).collect();
        if within.is_empty() { Err(Refused::NotPublic(name.to_owned())) } else { Ok(within) }
    }

    /// The same for a target, which may be an address itself.
    ///
    /// # Errors
    /// As of [`Names::addresses`].
    pub async fn resolve(&self, target: &Target, reach: Reach) -> Result<Vec<SocketAddr>, Refused> {
        let one = |address: IpAddr| {
            let refused = || Refused::NotPublic(target.host().to_string());
            if reach.includes(address) { Ok(vec![address]) } else { Err(refused()) }
        };
        let addresses = match target.host() {
            Host::Ipv4(address) => one((*address).into())?,
            Host::Ipv6(address) => one((*address).into())?,
            Host::Domain(name) => self.addresses(name, reach).await?,
        };
        Ok(addresses.into_iter().map(|address| SocketAddr::new(address, target.port())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(answer: &'static [&'static str]) -> Names {
        Names::new(move |_| async move { Ok(answer.iter().map(|text| text.parse().unwrap()).collect()) }.boxed())
    }

    async fn resolved(names: &Names, target: &str, reach: Reach) -> Result<Vec<String>, String> {
        let target = Target::parse(target).unwrap();
        let found = names.resolve(&target, reach).await.map_err(|refused| refused.to_string())?;
        Ok(found.iter().map(ToString::to_string).collect())
    }

    #[tokio::test]
    async fn only_addresses_within_reach_are_handed_on() {
        let mixed = names(&["10.0.0.1", "1.1.1.1", "::ffff:127.0.0.1", "2606:4700::1111"]);
        let public = resolved(&mixed, "a.example:443", Reach::Public).await;
        assert_eq!(public.unwrap(), ["1.1.1.1:443", "[2606:4700::1111]:443"]);
        assert_eq!(resolved(&mixed, "a.example:443", Reach::Anywhere).await.unwrap().len(), 4);
        let inside = names(&["127.0.0.1", "fd00::1"]);
        let refused = resolved(&inside, "a.example:443", Reach::Public).await.unwrap_err();
        assert_eq!(refused, "a.example has no public address, and is not allowed by its own name");
        let nothing = resolved(&names(&[]), "a.example:443", Reach::Anywhere).await.unwrap_err();
        assert_eq!(nothing, "the name a.example cannot be looked up");
    }

    #[tokio::test]
    async fn an_address_is_judged_without_a_question() {
        let nobody = Names::new(|name| panic!("asked for {name}"));
        assert_eq!(resolved(&nobody, "[::1]:80", Reach::Anywhere).await.unwrap(), ["[::1]:80"]);
        assert!(resolved(&nobody, "127.0.0.1:80", Reach::Public).await.is_err());
        assert_eq!(resolved(&nobody, "1.1.1.1:80", Reach::Public).await.unwrap(), ["1.1.1.1:80"]);
    }

    #[tokio::test]
    async fn the_systems_own_answer_is_judged_too() {
        let system = Names::default();
        assert!(resolved(&system, "localhost:80", Reach::Public).await.unwrap_err().contains("no public address"));
        assert!(!resolved(&system, "localhost:80", Reach::Anywhere).await.unwrap().is_empty());
    }
}
