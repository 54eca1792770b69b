package agent

import (
	"context"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Status is what a look knows of that which the daemon tells in its Status: Envoy, the rules that
// the kernel has, and the services that are wanted. What only time tells is not in it.
func (l Looked) Status() status.Status {
	s := status.Status{
		Schema: status.Schema, Envoy: envoyStatus(l.Seen), Backend: l.Backend,
		ServingPorts: l.Seen.Attribute.Config.ServingPorts,
	}
	if l.Known {
		s.Services = intercepted(l.Want.Served).services()
	}
	for i, family := range families {
		ours := l.Have[i].Ours()
		f := status.Family{Family: family.String(), Usable: l.HaveErr[i] == nil, Rules: ours.Len(),
			Jumps: ours.Intercepting()}
		if f.Jumps {
			s.Mode = "intercepting"
		}
		f.OutboundPort, f.InboundPort, f.DNSPort = ours.Ports()
		if err := l.HaveErr[i]; err != nil {
			f.Error = whyNot(err)
		} else if l.Known {
			f.Equal = len(iptables.Diff(l.Ruleset(i), l.Have[i])) == 0
			f.Services = len(l.Want.Families[i].Services)
			f.ServicePorts = len(l.Want.Families[i].ServicePorts)
		}
		s.Families = append(s.Families, f)
	}
	return s
}

// ServiceCounts asks the kernel how often the rows for services were used, by family. Nothing is
// counted of a family that could not be asked; whyNone is the reason, "" where all could.
func (l Looked) ServiceCounts(ctx context.Context) (counts []iptables.Counts, whyNone string) {
	kernel, err := iptables.Open(ctx, iptables.Options{ReadOnly: true})
	if err != nil {
		return nil, whyNot(err)
	}
	for i, family := range families {
		if l.HaveErr[i] != nil {
			continue // that it cannot be used is told elsewhere
		}
		c, err := kernel.ServiceCounts(ctx, family)
		if err != nil {
			whyNone = whyNot(err)
			continue
		}
		counts = append(counts, c)
	}
	return counts, whyNone
}
