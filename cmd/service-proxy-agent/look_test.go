package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
)

// TestDaemonsFile: a flag comes before the environment, which comes before the daemon's file, which
// is read as systemd does; what it says of other flags is nothing to a command that looks.
func TestDaemonsFile(t *testing.T) {
	was := daemonsFile
	defer func() { daemonsFile = was }()
	look := func(args ...string) (agent.Settings, string, error) {
		var s agent.Settings
		var output string
		c := &cobra.Command{Use: "look", SilenceErrors: true, SilenceUsage: true}
		settings := lookFlags(c)
		c.Flags().StringVar(&output, "output", "text", "")
		c.RunE = func(*cobra.Command, []string) (err error) { s, err = settings(); return err }
		withEnvironment(c)
		c.SetArgs(args)
		err := c.ExecuteContext(t.Context())
		return s, output, err
	}
	write := func(text string) {
		t.Helper()
		daemonsFile = filepath.Join(t.TempDir(), "service-proxy-agent")
		if err := os.WriteFile(daemonsFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(metadata.HostEnv, "") // it comes back after the test
	os.Unsetenv(metadata.HostEnv)
	write("# the daemon's\nSERVICE_PROXY_AGENT_ENVOY_ADMIN='127.0.0.1:1'\n" +
		"SERVICE_PROXY_AGENT_ENVOY_LOG=/file.log\nSERVICE_PROXY_AGENT_PROXY_USER=\"proxy\"\n" +
		"SERVICE_PROXY_AGENT_INTERCEPT_INTERFACES=docker0,\\\nbr0\n" +
		"SERVICE_PROXY_AGENT_OUTPUT=json\nGCE_METADATA_HOST=127.0.0.1:9\n")
	t.Setenv("SERVICE_PROXY_AGENT_ENVOY_LOG", "/env.log")
	t.Setenv("SERVICE_PROXY_AGENT_PROXY_USER", "env")
	t.Setenv("STATE_DIRECTORY", "/state")
	s, output, err := look("--proxy-user", "flag")
	if err != nil || s.EnvoyAdmin != "127.0.0.1:1" || s.EnvoyLog != "/env.log" || s.ProxyUser != "flag" ||
		len(s.Interfaces) != 2 || s.Interfaces[1] != "br0" || s.StateDir != "/state" ||
		s.Listen != defaultListen || output != "text" {
		t.Errorf("%+v, output %q, %v", s, output, err)
	}
	if host := os.Getenv(metadata.HostEnv); host != "127.0.0.1:9" {
		t.Errorf("the metadata server is %q", host)
	}
	write("GCE_METADATA_HOST=127.0.0.1:8\n")
	if s, _, err := look(); err != nil || s.EnvoyAdmin != defaultAdmin ||
		os.Getenv(metadata.HostEnv) != "127.0.0.1:9" {
		t.Errorf("%+v, %v", s, err)
	}
	// a folder; nothing
	for _, path := range []string{t.TempDir(), filepath.Join(t.TempDir(), "none")} {
		daemonsFile = path
		if s, _, err := look(); err != nil || s.EnvoyAdmin != defaultAdmin {
			t.Errorf("%s: %+v, %v", path, s, err)
		}
	}
}

// TestDoctorUsage is 64 before anything is looked at.
func TestDoctorUsage(t *testing.T) {
	for _, args := range [][]string{{"-o", "yaml"}, {"--fail-on", "loud"}, {"--ignore", "envoy-dwon"},
		{"x"}, {"--nonsense"}} {
		if code := execute(t.Context(), append([]string{"doctor"}, args...)); code != exitcode.Usage {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
}
