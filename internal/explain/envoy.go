package explain

import (
	"net/netip"
	"slices"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// behind says what Envoy does with the connection.
func (w why) behind() {
	choice := w.q.Choice(w.s, w.verdict.Port)
	if choice.Entry == nil {
		w.note("no listener of Envoy's has port %d: connections to it are refused", w.verdict.Port)
		return
	}
	w.answer.Listener = safe(choice.Listener.Name)
	none := true
	for _, one := range choice.Candidates {
		none = none && one.Chain == nil
		w.answer.Chains = append(w.answer.Chains, w.chain(*choice.Listener, one))
	}
	if choice.More > 0 {
		w.note("%d more filter chains may take it", choice.More)
	}
	if !none {
		return
	}
	ports := w.portsOf(*choice.Listener)
	finding := symptom.NoChain(w.q.To, safe(choice.Listener.Name), ports)
	if len(ports) > 0 {
		w.answer.Setting = excludePorts
	}
	if w.q.Inbound && w.verdict.Port == w.s.Asked.InboundPort {
		w.answer.Setting = controlPlane

		finding.Next = "have the control plane send an inbound listener with a chain for the port"
	}
	w.answer.Finding = &finding
	w.answer.Why = finding.Cause
	w.answer.Next = finding.Next
}

// portsOf are the ports that Envoy has of this very address.
func (w why) portsOf(l envoyadmin.Listener) (ports []uint16) {
	holds := func(p netip.Prefix) bool { return p.Contains(w.q.To.Addr()) }
	for _, c := range l.Chains {
		if c.Port != 0 && slices.ContainsFunc(c.Prefixes, holds) {
			ports = append(ports, c.Port)
		}
	}
	for _, s := range w.s.Services { // those of listeners without a socket too
		if s.Port != 0 && s.Prefix.IsValid() && holds(s.Prefix) {
			ports = append(ports, s.Port)
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

func (w why) chain(l envoyadmin.Listener, one envoyadmin.Candidate) Chain {
	when := make([]string, len(one.When))
	for i, text := range one.When {
		when[i] = safe(text)
	}
	c := one.Chain
	if c == nil {
		return Chain{None: true, When: when}
	}
	chain := Chain{Name: safe(c.Name), Service: safe(l.ServiceName(*c)), Default: one.Default,
		When: when, TLS: c.TLS, Route: safe(c.RouteConfig)}
	clusters := c.Clusters()
	switch {
	case c.HTTP:
		chain.Kind = "http"
	case c.TCP:
		chain.Kind = "tcp"
	}
	for _, routes := range w.s.Routes {
		if !c.HTTP || routes.Name != c.RouteConfig {
			continue
		}
		chain.HostCount = routes.Count
		for _, h := range routes.Hosts[:min(len(routes.Hosts), maxRoutedHosts)] {
			chain.Hosts = append(chain.Hosts, host(h))
		}
		clusters = append(clusters, ClustersOf(routes)...)
	}
	for _, name := range clusters[:min(len(clusters), MaxClusters)] {
		chain.Clusters = append(chain.Clusters, w.cluster(name))
	}
	return chain
}

// What of a chain is told one by one.
const (
	maxRoutedHosts = 10
	// MaxClusters is how many clusters of a chain are told.
	MaxClusters = 10
)

// ClustersOf are the clusters of routes, each once, in their order.
func ClustersOf(routes envoyadmin.Routes) (names []string) {
	for _, h := range routes.Hosts {
		for _, name := range h.Clusters {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

func host(h envoyadmin.VirtualHost) Host {
	return Host{Name: safe(h.Name), Domains: safeAll(h.Domains), Domain: h.DomainCount,
		Clusters: safeAll(h.Clusters[:min(len(h.Clusters), MaxClusters)]), Cluster: h.ClusterCount,
		ByHeader: h.ByHeader}
}

func safeAll(texts []string) (all []string) {
	for _, text := range texts {
		all = append(all, safe(text))
	}
	return all
}

func (w why) cluster(name string) Cluster {
	cluster := Cluster{Name: safe(name)}
	for _, known := range w.s.Endpoints {
		if known.Name != name {
			continue
		}
		cluster.Known = true
		cluster.Healthy, cluster.Degraded, cluster.Total = known.Healthy, known.Degraded, known.Total
		for _, e := range known.First {
			cluster.Endpoints = append(cluster.Endpoints,
				Endpoint{Address: safe(e.Address), Health: safe(string(e.Health))})
		}
	}
	return cluster
}
