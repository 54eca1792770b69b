package main

import (
	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// lookFlags gives a command that looks at the VM the flags of `run` that say where to look.
func lookFlags(c *cobra.Command) (settings func() (agent.Settings, error)) {
	s := agent.Settings{Version: version, Commit: commit, StateDir: progress.StateDir}
	var interfaces, resolvers []string
	f := c.Flags()
	f.StringVar(&s.EnvoyAdmin, "envoy-admin", defaultAdmin,
		"Envoy's admin interface: host:port or unix:///path")
	f.StringVar(&s.EnvoyLog, "envoy-log", "/var/log/envoy/envoy.err.log", "Envoy's stderr")
	f.StringVar(&s.ProxyUser, "proxy-user", "envoy", "user Envoy runs as, by name or uid")
	f.StringVar(&s.Config, "config", "",
		"file with the gce-service-proxy attribute's JSON, instead of the metadata server; "+
			"none: defaults")
	f.StringVar(&s.Listen, "listen", defaultListen, "the daemon's --listen")
	f.StringSliceVar(&interfaces, "intercept-interfaces", nil, "as the daemon has them")
	f.StringSliceVar(&resolvers, "resolver-users", agent.DefaultResolverUsers,
		"as the daemon has them")
	return func() (agent.Settings, error) {
		s.Interfaces, s.ResolverUsers = words(interfaces), words(resolvers)
		return s, nil
	}
}
