package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// ownLimit is how soon an address that became the VM's own is intercepted no more.
const ownLimit = 4 * time.Second

// networkFaults change addresses, routes and interfaces of the VM.
func networkFaults() []Fault {
	return []Fault{
		{Name: "net-address", Weight: 2, Group: "net-address", Shortest: 50 * time.Millisecond,
			Longest: 5 * time.Second, Begin: netAddress},
		// Under intercept-all-outbound what others than root ask of its own addresses is led, too.
		{Name: "net-own-vip", Weight: 2, Group: "net-own-vip", Shortest: 500 * time.Millisecond,
			Longest: 8 * time.Second, Unless: func(s Setting) bool { return s.All },
			Begin: netOwnVIP},
		{Name: "net-interface", Weight: 1, Group: "net-interface", Shortest: 100 * time.Millisecond,
			Longest: 5 * time.Second, Begin: netInterface},
		{Name: "net-mtu", Weight: 1, Group: "net-mtu", Longest: 4 * time.Second, Begin: netMTU},
		{Name: "net-ipv6-off", Weight: 1, Group: "net-way", Shortest: 100 * time.Millisecond,
			Longest: 6 * time.Second, Begin: netIPv6Off,
			// No way to any IPv6 address. A packet that was lost comes again within twice the time.
			Excuses: []Excuse{{Kind: Refused, Family: IPv6, After: 4 * time.Second},
				{Kind: Blocked, Family: IPv6, After: 4 * time.Second},
				{Kind: Cut, Family: IPv6, After: 8 * time.Second},
				{Kind: Severed, Family: IPv6, After: 8 * time.Second}}},
		{Name: "net-route-gone", Weight: 1, Group: "net-way", Shortest: 50 * time.Millisecond,
			Longest: 3 * time.Second, Begin: netRouteGone(IPv4),
			// Envoy's endpoints are IPv4's, those of IPv6 services, too.
			Excuses: []Excuse{{Kind: Refused, After: 4 * time.Second},
				{Kind: Blocked, After: 4 * time.Second},
				{Kind: Cut, After: 6 * time.Second}, {Kind: Severed, After: 6 * time.Second}}},
		{Name: "net-route6-gone", Weight: 1, Group: "net-way", Shortest: 50 * time.Millisecond,
			Longest: 3 * time.Second, Begin: netRouteGone(IPv6),
			Excuses: []Excuse{{Kind: Refused, Family: IPv6, After: 4 * time.Second},
				{Kind: Blocked, Family: IPv6, After: 4 * time.Second},
				{Kind: Cut, Family: IPv6, After: 6 * time.Second},
				{Kind: Severed, Family: IPv6, After: 6 * time.Second}}},
		{Name: "net-conntrack-deleted", Weight: 1, Begin: netConntrack,
			// The kernel has forgotten where a redirected stream leads, and takes one that is older than
			// the rules for new.
			Excuses: []Excuse{{Kind: Cut, After: time.Second}, {Kind: Severed, After: time.Second},
				{Kind: Refused, After: time.Second}}},
	}
}

// ip runs lines of ip -batch. force: one that fails does not keep the rest from being done.
func (w *World) ip(force bool, lines ...string) error {
	args := []string{"-batch", "-"}
	if force {
		args = append([]string{"-force"}, args...)
	}
	_, err := w.run(strings.Join(lines, "\n")+"\n", "ip", args...)
	if force {
		return nil
	}
	return err
}

// deprecated makes an IPv6 address one that no connection is made from: those would end with it.
const deprecated = " nodad preferred_lft 0"

// netAddress gives the VM another address of each family.
func netAddress(w *World, random *rand.Rand) (func() error, error) {
	n := 100 + random.IntN(100)
	four, six := fmt.Sprintf("10.128.0.%d/24 dev eth0", n), fmt.Sprintf("fd28::%x/64 dev eth0", n)
	// IPv6 may be off just then.
	return func() error { return w.ip(true, "addr del "+four, "addr del "+six) },
		w.ip(true, "addr add "+four, "addr add "+six+deprecated)
}

// netOwnVIP makes a service's address the VM's own: it is not to be intercepted then. Nobody
// listens there, so that each connection that is answered was redirected.
func netOwnVIP(w *World, random *rand.Rand) (func() error, error) {
	i := 200 + random.IntN(50)
	service := Extra(i)
	var lines, back []string
	for _, p := range service.Prefixes {
		line := "addr add " + p.String() + " dev eth0"
		if p.Addr().Is6() {
			line += deprecated
		}
		lines = append(lines, line)
		back = append(back, "addr del "+p.String()+" dev eth0")
	}
	undo := func() error { return nil }
	push := func() (err error) {
		undo, err = w.EditConfig(func(c *controlplane.Config) {
			c.Services = append(c.Services, service)
		})
		return err
	}
	serviceFirst := random.IntN(2) == 0
	if serviceFirst {
		if err := push(); err != nil {
			return nil, err
		}
		time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond)
	}
	began := time.Now()
	if err := w.ip(true, lines...); err != nil {
		return nil, err
	}
	var only []string
	for _, p := range service.Prefixes {
		only = append(only, p.Addr().String())
	}
	w.Excuse(Span{Event: Event{Name: "net-own-vip address"}, Begin: began, End: time.Now(),
		Excuses: []Excuse{{Kind: Hijacked, Only: only, After: ownLimit}}})
	if !serviceFirst {
		time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond)
		if err := push(); err != nil {
			return nil, err
		}
	}
	stop := background(func(ctx context.Context) {
		for sleep(ctx, 200*time.Millisecond) {
			for _, p := range service.Prefixes {
				w.callOwn(ctx, netip.AddrPortFrom(p.Addr(), 9000))
			}
		}
	})
	return func() error {
		stop()
		if err := w.ip(true, back...); err != nil {
			return err
		}
		return undo()
	}, nil
}

// callOwn connects to an address that is the VM's own.
func (w *World) callOwn(ctx context.Context, to netip.AddrPort) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	reach, err := lab.Probe(ctx, w.VM, AppUID, to)
	if err != nil || !w.has(to.Addr()) { // IPv6 was turned off, and the address with it
		return
	}
	w.Observe(Observation{Kind: Hijacked, Family: familyOf(to.Addr()), From: began, To: time.Now(),
		What: to.Addr().String(), Text: fmt.Sprintf("%+v answered on it", reach)})
}

// has says whether an address is the VM's.
func (w *World) has(a netip.Addr) bool {
	out, err := w.run("", "ip", "-o", "addr", "show", "to", a.String())
	return err == nil && strings.Contains(out, a.String())
}

// netInterface has an interface come, go up and down, and go.
func netInterface(w *World, random *rand.Rand) (func() error, error) {
	every := time.Duration(50+random.IntN(500)) * time.Millisecond
	if err := w.ip(false, "link add spare0 type veth peer name spare1",
		"addr add 10.99.0.1/24 dev spare0",
		"link set spare0 up", "link set spare1 up"); err != nil {
		return nil, err
	}
	stop := background(func(ctx context.Context) {
		for sleep(ctx, every) {
			_ = w.ip(true, "link set spare0 down", "link set spare0 up")
		}
	})
	return func() error {
		stop()
		return w.ip(false, "link del spare0")
	}, nil
}

// netMTU makes packets smaller, down to the least that IPv6 lives with.
func netMTU(w *World, random *rand.Rand) (func() error, error) {
	set := func(n int) error { return w.ip(false, fmt.Sprintf("link set eth0 mtu %d", n)) }
	return func() error { return set(1500) }, set(1280 + random.IntN(220))
}

// netIPv6Off turns IPv6 off, everywhere or on eth0, as an administrator does. Its addresses and
// routes go with it, and come back with whatever configures the network.
func netIPv6Off(w *World, random *rand.Rand) (func() error, error) {
	name := pick(random, []string{"all", "eth0"})
	set := func(value string) error {
		return w.VM.Do(func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte(value), 0)
		})
	}
	return func() error {
		if err := set("0"); err != nil {
			return err
		}
		return w.ip(false, "addr replace "+lab.VMAddr6.String()+"/64 dev eth0 nodad",
			"route replace default via "+lab.GatewayAddr6.String())
	}, set("1")
}

// netRouteGone takes the default route of a family away.
func netRouteGone(f Family) func(*World, *rand.Rand) (func() error, error) {
	gateway := lab.GatewayAddr
	if f == IPv6 {
		gateway = lab.GatewayAddr6
	}
	route := "default via " + gateway.String()
	return func(w *World, _ *rand.Rand) (func() error, error) {
		back := func() error { return w.ip(false, "route replace "+route) }
		return back, w.ip(false, "route del "+route)
	}
}

// netConntrack deletes entries of what is redirected, all of them or one service's.
func netConntrack(w *World, random *rand.Rand) (func() error, error) {
	f := pick(random, []string{"ipv4", "ipv6"})
	args := []string{"-D", "-f", f, "-p", "tcp"}
	if port := pick(random, []string{"", "81", "9000", "8081"}); port != "" {
		args = append(args, "--orig-port-dst", port)
	}
	if out, err := w.run("", "conntrack", args...); err != nil {
		w.Log("    %v %s", err, strings.TrimSpace(out)) // it says so, too, where there is none
	}
	return nil, nil
}
