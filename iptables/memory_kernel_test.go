//go:build kernel

package iptables

import (
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// Payloads of every kind that a plan is made of, good and bad, leave the same in both and are
// refused in the same words by both, apart from the folder and the time.
func TestTheMachineInMemoryDoesAsTheRealOne(t *testing.T) {
	payloads := []string{
		"*nat\n:F - [0:0]\n:SERVICE_PROXY_DNS - [0:0]\n-A F -j SERVICE_PROXY_DNS\n-A SERVICE_PROXY_DNS -p tcp -j RETURN\nCOMMIT\n",
		"*nat\n-A NOWHERE -j RETURN\nCOMMIT\n",
		"*nat\n-A OUTPUT -j NOWHERE\nCOMMIT\n",
		"*nat\n-A OUTPUT -p tcp -j ACCEPT\n-A OUTPUT -j NOWHERE\n-A OUTPUT -p udp -j ACCEPT\nCOMMIT\n",
		"*nat\n-D OUTPUT -p tcp -j RETURN\nCOMMIT\n",
		"*nat\n-I OUTPUT 5 -p tcp -j RETURN\nCOMMIT\n",
		"*nat\n-I OUTPUT 1 -p tcp -j RETURN\n-I OUTPUT 2 -p udp -j RETURN\n-I OUTPUT 1 -j F\nCOMMIT\n",
		"*nat\n-D OUTPUT -p tcp -j RETURN\n-A OUTPUT -p tcp -j RETURN\nCOMMIT\n",
		"*nat\n-X SERVICE_PROXY_DNS\nCOMMIT\n",
		"*nat\n:SERVICE_PROXY_DNS - [0:0]\n-X SERVICE_PROXY_DNS\nCOMMIT\n",
		"*nat\n:SERVICE_PROXY_DNS - [0:0]\n-D F -j SERVICE_PROXY_DNS\n-X SERVICE_PROXY_DNS\nCOMMIT\n",
		"*nat\n-X NOWHERE\nCOMMIT\n",
		"*nat\n-A OUTPUT -j RETURN\n",
		"*nat\n-A OUTPUT -p tcp -j ACCEPT\n-A INPUT -m owner --uid-owner 1 -j RETURN\n-A OUTPUT -p udp -j ACCEPT\nCOMMIT\n",
	}
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		// The kernel has the owner match in OUTPUT alone.
		m := &iptablestest.Machine{Backend: k.Backend(), Refuse: func(rule string) bool {
			return strings.HasPrefix(rule, "-A INPUT -m owner")
		}}
		program := command(k.Backend(), f, "")
		real := func(program string, stdin string, args ...string) (stdout, stderr string, exit int) {
			cmd := exec.Command(program, args...)
			cmd.Stdin = strings.NewReader(stdin)
			var said, words strings.Builder
			cmd.Stdout, cmd.Stderr = &said, &words
			if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
				t.Fatal(err)
			}
			return withoutComments(said.String()), words.String(), cmd.ProcessState.ExitCode()
		}
		same := func(what, program, stdin string, args ...string) {
			t.Helper()
			stdout, stderr, exit := real(program, stdin, args...)
			gotStdout, gotStderr, gotExit := m.Run(program, args, stdin)
			if gotStdout = withoutComments(gotStdout); gotStdout != stdout || gotStderr != stderr ||
				gotExit != exit {
				t.Errorf("%s: exit %d, in memory %d\n%s\nin memory\n%s\n%s\nin memory\n%s", what, exit, gotExit,
					stderr, gotStderr, stdout, gotStdout)
			}
		}
		same("an unused table", program+"-save", "", "-t", "nat")
		for _, payload := range payloads {
			same(payload, program+"-restore", payload, "--noflush", "-w", "5")
			same("after "+payload, program+"-save", "", "-t", "nat")
		}
		for _, chain := range []string{"F", "OUTPUT", "NOWHERE"} {
			same("list "+chain, program, "", "-w", "5", "-t", "nat", "-S", chain)
		}
		same("version", program, "", "--version")
	})
}

func withoutComments(save string) string {
	return strings.Join(slices.DeleteFunc(strings.Split(save, "\n"), func(line string) bool {
		return strings.HasPrefix(line, "#")
	}), "\n")
}
