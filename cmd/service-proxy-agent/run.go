package main

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/cloudlog"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Defaults that several commands share.
var (
	defaultAdmin  = fmt.Sprintf("127.0.0.1:%d", attribute.EnvoyAdminPort)
	defaultListen = fmt.Sprintf(":%d", attribute.AgentPort)
)

func runCommand() *cobra.Command {
	s := agent.Settings{Version: version, Commit: commit, StateDir: progress.StateDir}
	var level, whenDown string
	var interfaces, resolvers []string
	c := &cobra.Command{
		Use:   "run",
		Short: "The daemon: keep the rules equal to what Envoy needs, and tell how the VM is doing",
		Long: "Keeps the rules equal to what Envoy's listeners need, and tells the world how the VM is " +
			"doing: in guest attributes, on serial port 1, in Cloud Logging, and by /metrics and " +
			"/healthz. It is the unit service-proxy-agent.service. When it ends, the rules stay.\n\n" +
			"Each flag has an environment twin (--envoy-admin: SERVICE_PROXY_AGENT_ENVOY_ADMIN); a flag " +
			"wins. The unit reads /etc/default/service-proxy-agent. GCE_METADATA_HOST is honoured.\n\n" +
			"Exit code: 0 told to end; 1 an error; 64 wrong usage.",
		Example: "  sudo service-proxy-agent run --envoy-admin 127.0.0.1:9901 --log-level debug",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s.WhenEnvoyDown = reconcile.WhenEnvoyDown(whenDown)
			s.Interfaces, s.ResolverUsers = words(interfaces), words(resolvers)
			if dir := os.Getenv("STATE_DIRECTORY"); dir != "" {
				s.StateDir = dir // systemd.exec(5), StateDirectory=
			}
			log, err := logger(level)
			if err != nil {
				return usage(err)
			}
			defer func() { _ = log.Sync() }() // stderr cannot be synced everywhere
			if os.Getenv("GOGC") == "" {
				// The agent allocates in bursts (a dump, a save) and is idle in between. At 10,000 services
				// this holds 25 MB and not 34, for a tenth more time from start to first rule (BenchmarkStart).
				debug.SetGCPercent(20)
			}
			a, err := agent.New(cmd.Context(), s, log)
			if err != nil {
				return err
			}
			return a.Run(cmd.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&s.EnvoyAdmin, "envoy-admin", defaultAdmin,
		"`ADDRESS` of Envoy's admin interface: host:port or unix:///path")
	f.StringVar(&s.EnvoyLog, "envoy-log", "/var/log/envoy/envoy.err.log",
		"`FILE` with Envoy's stderr, watched for hints that something changed; empty: poll only")
	s.EnvoyShare = agent.DefaultEnvoyShare
	f.Var((*percent)(&s.EnvoyShare), "envoy-share", fmt.Sprintf("most `PERCENT` of the time of "+
		"Envoy's main thread that questions may take while something changes: %d to %d",
		agent.MinEnvoyShare, agent.MaxEnvoyShare))
	f.StringVar(&s.ProxyUser, "proxy-user", "envoy",
		"`USER` Envoy runs as, by name or uid: its traffic is never redirected")
	f.StringVar(&s.Config, "config", "",
		"`FILE` with the gce-service-proxy attribute's JSON, instead of the metadata server; "+
			"none: defaults")
	f.StringVar(&s.Listen, "listen", defaultListen, "`ADDRESS` of /metrics and /healthz; empty: off")
	f.StringVar(&s.MetricsListen, "metrics-listen", "",
		"`ADDRESS` of /metrics alone, which then leaves --listen; empty: it stays there")
	f.StringVar(&s.WebConfigFile, "web-config-file", "",
		"`FILE` with TLS and users of --metrics-listen, in the format of Prometheus' exporter-toolkit; "+
			"empty: plain HTTP for everybody")
	f.StringVar(&s.SerialPort, "serial-port", "/dev/ttyS0", "`FILE` of serial port 1; empty: off")
	f.StringVar(&s.CloudLogging, "cloud-logging", string(cloudlog.Auto),
		"`WHEN` to write entries in Cloud Logging: auto (on a Compute Engine VM whose scopes allow "+
			"it), on or off")
	f.StringVar(&whenDown, "when-envoy-down", string(reconcile.Keep),
		"`WHAT` becomes of the jumps when Envoy stops accepting: keep or bypass; "+
			"metadata may have a fleet bypass")
	f.StringSliceVar(&interfaces, "intercept-interfaces", nil,
		"`INTERFACES` of containers whose outbound connections are intercepted too, such as docker0")
	f.StringSliceVar(&resolvers, "resolver-users", agent.DefaultResolverUsers,
		"`USERS` that the VM's own DNS resolvers run as, by name or uid: with intercept-dns their "+
			"questions are not redirected, or they would loop; takes the place of the default")
	f.StringVar(&level, "log-level", "info",
		"least `LEVEL` that is logged: debug, info, warn or error")
	return c
}

// percent is a flag's whole number of percent. The bounds are the setting's own.
type percent int

// Set takes decimal digits alone. pflag's own numbers would take 010 for 8, and say of others what
// strconv says.
func (p *percent) Set(text string) error {
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return errors.New("it is no whole number of percent")
	}
	*p = percent(n)
	return nil
}

func (p *percent) String() string { return strconv.Itoa(int(*p)) }

// Type is pflag's word for what it takes.
func (p *percent) Type() string { return "int" }

// words are the entries of a list without the space around them.
func words(list []string) (some []string) {
	for _, w := range list {
		if w = strings.TrimSpace(w); w != "" {
			some = append(some, w)
		}
	}
	return some
}

// logger writes to the journal where that is where stderr leads, and else to stderr.
func logger(level string) (*zap.Logger, error) {
	l, err := zapcore.ParseLevel(level)
	if err != nil || l > zapcore.ErrorLevel {
		return nil, fmt.Errorf("--log-level is %q; use debug, info, warn or error", level)
	}
	if systemd.InJournal() {
		// Without a socket of its own it reads what comes by stderr, as it does anyway.
		if journal, err := systemd.NewJournal(l, "service-proxy-agent", messageID); err == nil {
			return zap.New(journal), nil
		}
	}
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	enc.EncodeLevel = zapcore.LowercaseLevelEncoder
	return zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(enc), zapcore.Lock(os.Stderr), l)), nil
}

// messageID is the journal's of a symptom that came, or of one that is over.
func messageID(id string, over bool) string {
	if over {
		return symptom.Over.MessageID()
	}
	return symptom.ID(id).MessageID()
}
