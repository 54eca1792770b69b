package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// daemonsFile is where the daemon's unit has its settings from. A command that looks at the same VM
// reads it, too: a flag comes first, then the environment, then this file.
var daemonsFile = "/etc/default/service-proxy-agent"

// ofDaemon marks the flags whose values are in that file, too.
const ofDaemon = "of the daemon"

// lookFlags gives a command that looks at the VM the flags of `run` that say where to look.
func lookFlags(c *cobra.Command) (settings func() (agent.Settings, error)) {
	s := agent.Settings{Version: version, Commit: commit, StateDir: progress.StateDir}
	var interfaces, resolvers []string
	f := c.Flags()
	f.StringVar(&s.EnvoyAdmin, "envoy-admin", defaultAdmin,
		"`ADDRESS` of Envoy's admin interface: host:port or unix:///path")
	f.StringVar(&s.EnvoyLog, "envoy-log", "/var/log/envoy/envoy.err.log",
		"`FILE` with Envoy's stderr")
	f.StringVar(&s.ProxyUser, "proxy-user", "envoy", "`USER` Envoy runs as, by name or uid")
	f.StringVar(&s.Config, "config", "",
		"`FILE` with the gce-service-proxy attribute's JSON, instead of the metadata server; "+
			"none: defaults")
	f.StringVar(&s.Listen, "listen", defaultListen,
		"the daemon's --listen `ADDRESS`, whose port is never intercepted")
	f.StringVar(&s.MetricsListen, "metrics-listen", "",
		"the daemon's --metrics-listen `ADDRESS`, the same")
	f.StringSliceVar(&interfaces, "intercept-interfaces", nil,
		"the `INTERFACES` of the daemon's --intercept-interfaces")
	f.StringSliceVar(&resolvers, "resolver-users", agent.DefaultResolverUsers,
		"the `USERS` of the daemon's --resolver-users")
	for _, name := range []string{"envoy-admin", "envoy-log", "proxy-user", "config", "listen",
		"metrics-listen", "intercept-interfaces", "resolver-users"} {
		_ = f.SetAnnotation(name, ofDaemon, nil) // it is there
	}
	return func() (agent.Settings, error) {
		s.Interfaces, s.ResolverUsers = words(interfaces), words(resolvers)
		if dir := os.Getenv("STATE_DIRECTORY"); dir != "" {
			s.StateDir = dir // as with the daemon
		}
		client, err := envoyadmin.New(s.EnvoyAdmin)
		if err != nil {
			return s, usage(fmt.Errorf("--envoy-admin: %w", err))
		}
		client.Close()
		return s, nil
	}
}

// fromDaemonsFile gives the flags that have no value yet those of the daemon's file. A file that
// cannot be read is told, and no reason not to look.
func fromDaemonsFile(flags *pflag.FlagSet) (err error) {
	var file map[string]string
	flags.VisitAll(func(f *pflag.Flag) {
		if _, of := f.Annotations[ofDaemon]; !of || err != nil {
			return
		}
		if file == nil {
			file = readDaemonsFile()
		}
		value, set := file[envName(f.Name)]
		if !set || f.Changed {
			return
		}
		if e := flags.Set(f.Name, value); e != nil {
			err = usage(fmt.Errorf("%s: %s=%q: %w", daemonsFile, envName(f.Name), value, e))
		}
	})
	host := file[metadata.HostEnv]
	if _, set := os.LookupEnv(metadata.HostEnv); host != "" && !set && err == nil {
		err = os.Setenv(metadata.HostEnv, host)
	}
	return err
}

func readDaemonsFile() map[string]string {
	text, err := os.ReadFile(daemonsFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(os.Stderr, "service-proxy-agent: %v: the daemon's settings are not known; "+
			"give them as flags, or run as root\n", err)
	}
	return envfile.Parse(string(text))
}

// unwritten is the error of an answer that could not be written. Nobody has it then, so that it is
// none: 1 would say what was found.
func unwritten(err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code: exitcode.NotKnown, err: fmt.Errorf("write the answer: %w", err)}
}
