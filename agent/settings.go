package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/cloudlog"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
)

// Settings describe the VM; the gce-service-proxy attribute describes the traffic. Each field is a
// flag of `run` of the same name with an environment twin (see cmd/service-proxy-agent).
type Settings struct {
	EnvoyAdmin string // "127.0.0.1:15000" or "unix:///path"
	// Envoy's stderr, the hint that something changed; "" turns the hint off
	EnvoyLog string
	// EnvoyShare is how many percent of the time of Envoy's main thread the agent's questions may take
	// while something changes: MinEnvoyShare to MaxEnvoyShare
	EnvoyShare int
	ProxyUser  string // name or uid that Envoy runs as
	// a file with the attribute's JSON; "": the metadata server; "none": defaults
	Config string
	Listening
	SerialPort    string                  // "" turns it off
	CloudLogging  string                  // auto, on, off; see cloudlog.ParseMode
	WhenEnvoyDown reconcile.WhenEnvoyDown // keep or bypass
	Interfaces    []string                // --intercept-interfaces
	// names or uids of the VM's resolvers, whose DNS questions are never redirected
	ResolverUsers []string
	StateDir      string // what is kept between starts
	Version       string // of this agent, for status and metrics
	Commit        string
}

// Listening is where the agent answers HTTP.
type Listening struct {
	Listen        string // /metrics, /healthz; "" turns it off
	MetricsListen string // /metrics instead; "": it stays on Listen
	WebConfigFile string // TLS and users of MetricsListen; "": plain HTTP for all
}

// The bounds of Settings.EnvoyShare, and what it is where nobody says. With half of Envoy's main
// thread its own work, updates and the health of endpoints, would take twice as long.
const (
	MinEnvoyShare     = 1
	DefaultEnvoyShare = 10 // envoyadmin.DefaultShare
	MaxEnvoyShare     = 50
)

// Errors of settings. cmd answers them with exit code 64.
var ErrSettings = errors.New("bad setting")

// Validate refuses settings that cannot work, naming the flag and what it takes.
func (s Settings) Validate() error {
	if s.WhenEnvoyDown != reconcile.Keep && s.WhenEnvoyDown != reconcile.Bypass {
		return fmt.Errorf("%w: --when-envoy-down is %q; use keep or bypass", ErrSettings, s.WhenEnvoyDown)
	}
	if s.EnvoyShare < MinEnvoyShare || s.EnvoyShare > MaxEnvoyShare {
		return fmt.Errorf("%w: --envoy-share is %d; use a whole number of percent from %d to %d",
			ErrSettings, s.EnvoyShare, MinEnvoyShare, MaxEnvoyShare)
	}
	if s.ProxyUser == "" {
		return fmt.Errorf("%w: --proxy-user is empty; name the user Envoy runs as", ErrSettings)
	}
	if err := s.validateListen(); err != nil {
		return err
	}
	if _, err := s.cloudLogging(); err != nil {
		return err
	}
	for _, i := range s.Interfaces {
		// IFNAMSIZ is 16 with its NUL; the kernel refuses '/' and white space; iptables reads a '+' at
		// the end as a wildcard.
		if i == "" || len(i) > 15 || slices.ContainsFunc([]byte(i), func(c byte) bool {
			return c <= ' ' || c == '/' || c == '"' || c == '\'' || c == '\\' || c >= 0x7f
		}) {
			return fmt.Errorf("%w: --intercept-interfaces has %q, which is no interface name",
				ErrSettings, i)
		}
	}
	return nil
}

func (s Settings) cloudLogging() (cloudlog.Mode, error) {
	mode, err := cloudlog.ParseMode(s.CloudLogging)
	if err != nil {
		return mode, fmt.Errorf("%w: --cloud-logging %w", ErrSettings, err)
	}
	return mode, nil
}

// validateListen says nothing of the web config file itself: one that is wrong must not keep the
// agent from its rules, so that it is a finding.
func (s Settings) validateListen() error {
	ports := map[string]string{}
	for _, flag := range []struct{ name, addr string }{
		{"--listen", s.Listen}, {"--metrics-listen", s.MetricsListen},
	} {
		if flag.addr == "" {
			continue
		}
		_, port, err := net.SplitHostPort(flag.addr)
		if err != nil || !validPort(port) {
			return fmt.Errorf("%w: %s is %q; use host:port or :port", ErrSettings, flag.name, flag.addr)
		}
		n, _ := strconv.Atoi(port) // it is valid
		ports[flag.name] = strconv.Itoa(n)
	}
	if port, both := ports["--listen"]; both && port == ports["--metrics-listen"] {
		return fmt.Errorf("%w: --metrics-listen is %q, which has the port of --listen %q; use another, "+
			"or neither --metrics-listen nor --web-config-file", ErrSettings, s.MetricsListen, s.Listen)
	}
	if s.WebConfigFile != "" && s.MetricsListen == "" {
		return fmt.Errorf("%w: --web-config-file is %q without --metrics-listen; give /metrics an "+
			"address of its own: health checkers, who ask --listen, know neither users nor certificates",
			ErrSettings, s.WebConfigFile)
	}
	return nil
}

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

func portString(p uint16) string { return strconv.Itoa(int(p)) }

// ownPorts are never intercepted as port rules: Envoy's admin and interception
// ports and the agent's own.
func ownPorts(s Settings) []uint16 {
	ports := attribute.OwnPorts()
	for _, addr := range []string{s.EnvoyAdmin, s.Listen, s.MetricsListen} {
		if _, p, err := net.SplitHostPort(addr); err == nil {
			if n, err := net.LookupPort("tcp", p); err == nil {
				ports = append(ports, uint16(n))
			}
		}
	}
	return sortedPorts(ports)
}

// proxyIDs resolves --proxy-user, which must not be root.
func proxyIDs(name string, userIDs func(string) (uid, gid uint32, err error)) proxyUser {
	uid, gid, err := userIDs(name)
	if err == nil && uid == 0 {
		return proxyUser{Err: fmt.Errorf(
			"look up user %q: it is root, whose traffic cannot be told from everybody else's", name)}
	}
	return proxyUser{uid, gid, err}
}

// sleep waits for d or until ctx ends, and says whether it slept.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
