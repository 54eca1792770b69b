//go:build kernel

package bootstrap

import (
	"context"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// On a machine without IPv4 the attribute is read, the VM found and a guest attribute written at
// fd20:ce::254: with the kernel's own refusal of 169.254.169.254, in a network namespace of its
// own, which the test enters by running itself there.
func TestIPv6OnlyVM(t *testing.T) {
	if os.Getenv("IPV6_ONLY_VM") == "" {
		cmd := exec.Command("unshare", "--net", os.Args[0], "-test.run=^TestIPv6OnlyVM$", "-test.count=1")
		cmd.Env = append(os.Environ(), "IPV6_ONLY_VM=1", "GCE_METADATA_HOST=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"}, {"-6", "address", "add", "fd20:ce::254/128", "dev", "lo", "nodad"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	const address = "2600:1900:4010:1::2"
	server := platform.New(platform.VM{IP: "none", IPv6: address, Attributes: map[string]string{
		"gce-service-proxy": `{"labels": {"a": "b"}}`}})
	defer server.Close()
	ln, err := net.Listen("tcp6", "[fd20:ce::254]:80")
	if err != nil {
		t.Fatal(err)
	}
	server.Serve(ln, nil)
	// The kernel makes the route of a new address beside (addrconf_dad_work), some time later.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		c, err := net.DialTimeout("tcp6", "[fd20:ce::254]:80", time.Second)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}

	if a := metadata.ReadAttribute(t.Context()); a.Err != nil || a.Config.Labels["a"] != "b" {
		t.Errorf("the attribute: %+v", a)
	}
	if vm, err := readVM(t.Context()); err != nil || vm.IP != address {
		t.Errorf("the VM: %+v, %v", vm, err)
	}
	if account, err := metadata.ReadAccount(t.Context()); err != nil || account.Email == "" {
		t.Errorf("the account: %+v, %v", account, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	writer := guestattr.New(guestattr.Options{})
	writer.Set(guestattr.ProxyVersion, "x")
	go writer.Run(ctx)
	for server.GuestAttributes(guestattr.Namespace)[guestattr.ProxyVersion] != "x" {
		if !sleep(ctx, 20*time.Millisecond) {
			t.Fatalf("no guest attribute was written: %+v", writer.State())
		}
	}
}
