package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

const helpText = "" +
	`add NAME VIP     a service more, e.g. add pay 10.10.0.3 (also a prefix, 10.20.0.0/24, or IPv6)
remove NAME      one less
list             the services
status           what the agent says
log              the end of the agent's log
help             this
quit             the end (Ctrl-C and Ctrl-D too)`

// play stays up until quit or a signal. Services come and go by commands from in; everything else
// the visitor does from another terminal.
func (d *demo) play(ctx context.Context, in *os.File) error {
	if err := d.invite(); err != nil {
		return err
	}
	d.taken = d.services
	_, err := unix.IoctlGetTermios(int(in.Fd()), unix.TCGETS)
	terminal := err == nil
	// In the background (`make demo KEEP=1 &`, or Ctrl-Z and bg) reading the terminal would stop the
	// whole job, agent and Envoy included. With SIGTTIN ignored it is an error, EIO.
	signal.Ignore(syscall.SIGTTIN)
	typedLines := make(chan string)
	go func() { // ends with the program: a read from a terminal cannot be called off
		defer close(typedLines)
		s := bufio.NewScanner(in)
		for s.Scan() {
			typedLines <- s.Text()
		}
		terminal = terminal && s.Err() == nil
	}()
	d.gap()
	for {
		if typedLines != nil {
			d.ask()
		}
		select {
		case <-ctx.Done():
			d.line("")
			return nil
		case text, more := <-typedLines:
			switch {
			case !more && terminal: // Ctrl-D
				d.line("")
				return nil
			case !more:
				d.line("")
				d.say("Nothing more to read here: everything stays up until Ctrl-C (or SIGTERM to %d).",
					os.Getpid())
				typedLines = nil
				continue
			}
			if quit := d.obey(ctx, strings.Fields(text)); quit {
				return nil
			}
		}
	}
}

// ask prints the prompt, which stays on its line.
func (d *demo) ask() {
	if d.err == nil {
		if _, d.err = io.WriteString(d.out, d.in(bold, "demo> ")); d.err != nil {
			d.broken(d.err)
		}
	}
}

// invite says what can be done from another terminal: lines to copy.
func (d *demo) invite() error {
	at, err := d.you()
	if err != nil {
		return err
	}
	binary, err := mesh.Binary()
	if err != nil {
		return err
	}
	// gcloud's settings are a dozen variables: they go into a script, so that the line stays
	// one that can be copied.
	script := filepath.Join(d.mesh.Dir, "gcloud.sh")
	line := typed(append(append([]string{"env", "-i"}, at.env...), "nsenter",
		"--net="+path(d.mesh.Client), "gcloud"))
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexec "+line+` "$@"`+"\n"), 0o755); err != nil {
		return err
	}
	vm, client := "nsenter --net="+path(d.mesh.VM), "nsenter --net="+path(d.mesh.Client)
	iptables := "iptables-" + string(d.mesh.Backend)
	d.heading("Yours to play with. From another terminal, as root:")
	for _, l := range []string{
		vm + " curl -sSi --noproxy '*' http://10.10.0.1/",
		vm + " " + iptables + " -t nat -nL SERVICE_PROXY_SERVICE_CIDRS",
		vm + " " + iptables + " -t nat -F SERVICE_PROXY_OUTPUT     # look again: it is back",
		client + fmt.Sprintf(" curl -sSi --noproxy '*' http://10.128.0.2:%d/", mesh.AppPort),
		"RUNTIME_DIRECTORY=" + filepath.Join(d.mesh.Dir, "agent", "run") + " " +
			typed([]string{binary}) + " status",
		script + " compute instances get-guest-attributes " + vmName + " --query-path=" + namespace + "/",
		script + " compute instances get-serial-port-output " + vmName,
		fmt.Sprintf(
			"kill -STOP %d; sleep 20; kill -CONT %d     # Envoy hangs: status tells after about 10 s",
			d.mesh.Envoy.PID(), d.mesh.Envoy.PID()),
	} {
		d.line(indent + l)
	}
	d.gap()
	d.say("And here:")
	d.output(helpText)
	return nil
}

// obey carries out one command.
func (d *demo) obey(ctx context.Context, words []string) (quit bool) {
	if len(words) == 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var err error
	switch verb, args := words[0], words[1:]; {
	case (verb == "quit" || verb == "exit") && len(args) == 0:
		return true
	case verb == "help" && len(args) == 0:
		d.output(helpText)
	case verb == "list" && len(args) == 0:
		for _, s := range d.services {
			mark := ""
			if !slices.ContainsFunc(d.taken, func(t controlplane.Service) bool { return t.Name == s.Name }) {
				mark = "  not taken by Envoy"
			}
			d.line(fmt.Sprintf("%s%-12s %v%s", indent, s.Name, s.Prefixes, mark))
		}
	case verb == "log" && len(args) == 0:
		d.output(last(d.agent.Log(), 15))
	case verb == "status" && len(args) == 0:
		var out, stderr string
		out, stderr, _, err = d.agent.Run(ctx, "status")
		d.output(out + stderr)
	case verb == "add" && len(args) == 2:
		err = d.add(ctx, args[0], args[1])
	case verb == "remove" && len(args) == 1:
		err = d.remove(ctx, args[0])
	default:
		err = fmt.Errorf("%q is no command here: try help", strings.Join(words, " "))
	}
	if err != nil && ctx.Err() != context.Canceled {
		d.output(err.Error())
	}
	return false
}

var serviceName = regexp.MustCompile(`^[a-z][-a-z0-9]{0,40}$`)

// add has the control plane send one service more.
func (d *demo) add(ctx context.Context, name, at string) error {
	prefix, err := parsePrefix(at)
	switch {
	case err != nil:
		return err
	case !serviceName.MatchString(name):
		return fmt.Errorf("%q is no service name: small letters, digits, and -", name)
	case d.find(name) >= 0:
		return fmt.Errorf("there is a service %s: remove it first", name)
	}
	// Endpoints 1 to 254 in turn.
	s := service(name, byte(3+len(d.services)%250))
	s.Prefixes = []netip.Prefix{prefix}
	return d.change(ctx, append(slices.Clone(d.services), s), s, d.reachable,
		"from the push to the first redirected connection")
}

// remove has it send one less.
func (d *demo) remove(ctx context.Context, name string) error {
	i := d.find(name)
	if i < 0 {
		return fmt.Errorf("there is no service %q: see list", name)
	}
	s := d.services[i]
	return d.change(ctx, slices.Delete(slices.Clone(d.services), i, i+1), s, d.gone,
		"from the push to the first connection that is not redirected")
}

// change pushes services and waits a while for what the agent makes of it, which may be nothing:
// Envoy refuses two services at one VIP, the agent addresses that nobody may intercept.
func (d *demo) change(ctx context.Context, services []controlplane.Service, s controlplane.Service,
	wait func(context.Context, controlplane.Service, time.Time) (time.Duration, error),
	what string) error {
	others := slices.DeleteFunc(slices.Clone(services), func(o controlplane.Service) bool {
		return o.Name == s.Name
	})
	shared := slices.IndexFunc(others, func(o controlplane.Service) bool {
		return o.Prefixes[0].Overlaps(s.Prefixes[0])
	})
	refused := len(d.mesh.CP.Rejections())
	d.services = services
	push, err := d.push()
	if err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	// Envoy's answer first: a connection to a VIP that another service has too says nothing.
	for refused == len(d.mesh.CP.Rejections()) && short.Err() == nil {
		one, cancel := context.WithTimeout(short, 50*time.Millisecond)
		err = d.mesh.CP.WaitAccepted(one, push)
		cancel()
		if err == nil {
			d.taken = services
			break
		}
	}
	if news := d.mesh.CP.Rejections(); len(news) > refused {
		return fmt.Errorf("Envoy refuses the listeners: %s", news[len(news)-1].Details)
	}
	if shared >= 0 {
		d.ok("Envoy took it; %s has that VIP as well", others[shared].Name)
		return nil
	}
	took, err := wait(short, s, push.At)
	if err != nil {
		return fmt.Errorf("nothing came of it within 3 s: status and log may say why (%v)", err)
	}
	d.ok("%s %s", ms(took), what)
	return nil
}

func (d *demo) find(name string) int {
	return slices.IndexFunc(d.services, func(s controlplane.Service) bool { return s.Name == name })
}

// parsePrefix takes an address, or a prefix.
func parsePrefix(text string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(text); err == nil && addr.Zone() == "" {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, errors.New(text + " is neither an address (10.10.0.3) nor a prefix (10.20.0.0/24)")
	}
	return p.Masked(), nil
}
