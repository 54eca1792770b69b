// Command demo shows the main job on real parts, in network namespaces of its own: a VM with a real
// Envoy and the built service-proxy-agent, a client, a control plane and the emulated platform
// (package mesh). It runs the commands that a visitor would type and shows what they print.
//
// Every claim is checked: a step that does not hold is named, everything is taken down, and the
// exit code is 1. SIGINT, SIGTERM, SIGHUP and a reader that goes away end it at any moment with
// nothing left behind; after kill -9 the lab's own reaper does the same. Your own network namespace
// and rules are never touched.
//
//	demo          the steps, then takes everything down
//	demo -keep    the steps, then stays up with a prompt (see play.go)
//
// $AGENT and $ENVOY name the binaries; without them they are looked for in build/.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

func main() { os.Exit(run()) }

// signalled is why a run ended early.
type signalled struct{ syscall.Signal }

func (s signalled) Error() string { return s.String() }

func run() (code int) {
	keep := flag.Bool("keep", false, "stay up after the last step, with a prompt")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: demo [-keep]   (make demo, make demo KEEP=1)")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		return 64
	}
	envoy, err := lookFirst()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", oneLine(err))
		return 1
	}

	ctx, end := context.WithCancelCause(context.Background())
	defer end(nil)
	// With SIGPIPE taken, writing to a reader that went away is an error like any other, and
	// everything is taken down in order.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	go func() {
		end(signalled{(<-signals).(syscall.Signal)})
		signal.Reset() // the second one ends at once; the reaper then does the taking down
	}()
	n := newNarrator(os.Stdout, func(err error) { end(err) })
	d := &demo{narrator: n, envoyBinary: envoy, began: time.Now()}
	if err := d.prepare(ctx); err != nil && cause(ctx) == nil {
		fmt.Fprintln(os.Stderr, "demo:", oneLine(unstarted(err)))
		if err := d.close(); err != nil {
			fmt.Fprintln(os.Stderr, "demo: taking down:", oneLine(err))
		}
		return 1
	}
	err = d.steps(ctx)
	took := time.Since(d.began)
	if err == nil {
		n.gap()
		n.say("Every step held, in %.1f s.", took.Seconds())
		if *keep {
			err = d.play(ctx, os.Stdin)
		}
	}
	if err != nil {
		err = cmp.Or(cause(ctx), err)
	}
	var by signalled
	switch {
	case err == nil:
	case errors.As(err, &by):
		code = 128 + int(by.Signal)
		n.gap()
		if d.step == 0 {
			n.say("Ended by signal (%s) before the first step.", by)
		} else {
			n.say("Ended by signal (%s) in step %d.", by, d.step)
		}
	default:
		code = 1
		n.failed("step %d (%s) does not hold: %v", d.step, d.title, err)
		d.tails(err)
	}
	return max(code, d.takeDown())
}

// cause is the signal that explains an error, if there was one. Ctrl-C goes to everything
// that runs on the terminal, so that the end of the others can be seen before the signal
// itself: it gets a moment.
func cause(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-time.After(100 * time.Millisecond):
	}
	return context.Cause(ctx)
}

// takeDown says what came of it: exit code 0, or 1 if something is left.
func (d *demo) takeDown() (code int) {
	if err := d.close(); err != nil {
		d.failed("taking down: %v", err)
		return 1
	}
	d.say("Taken down: no namespace, process or file of the demo is left.")
	return 0
}

// lookFirst finds what the demo needs before anything is made, and says where Envoy is.
func lookFirst() (envoy string, err error) {
	// Debian's `su` leaves root without the folders that iptables and ip are in.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	if os.Geteuid() != 0 {
		return "", errors.New(
			`network namespaces and iptables need root: try sudo env "PATH=$PATH" make demo`)
	}
	if _, err := exec.LookPath("curl"); err != nil {
		return "", errors.New("curl is not on PATH: `make tools` installs it, or apt-get install curl")
	}
	agent, err := mesh.Binary()
	if err != nil {
		return "", err
	}
	if _, err := exec.LookPath(agent); err != nil {
		return "", fmt.Errorf("find the agent: %w: run `make build`, or name one by $AGENT", err)
	}
	return lab.FindEnvoy()
}

// unstarted is a machine on which there can be no lab, told with the next step.
func unstarted(err error) error {
	var missing *lab.MissingError
	if errors.As(err, &missing) {
		return err // which names the package
	}
	return fmt.Errorf("%w: use a VM, or a container started with --privileged", err)
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
