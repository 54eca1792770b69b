//go:build kernel

package iptables

import (
	"io"
	"net"
	"testing"
	"time"
)

// Conntrack starts with the first NAT rule, and connections that are older look new to it. Settling
// keeps them out of the redirect; without it they are cut, which is tested too so that the first
// half shows something.
func TestFirstInstallSparesOlderStreams(t *testing.T) {
	for _, settling := range []bool{true, false} {
		name := map[bool]string{true: "settling", false: "at-once"}[settling]
		t.Run(name, func(t *testing.T) {
			eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
				everyAddressIsLocal(t, f)
				server, err := net.Listen("tcp", net.JoinHostPort("", "443"))
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					for {
						c, err := server.Accept()
						if err != nil {
							return
						}
						go io.Copy(c, c)
					}
				}()
				envoy, err := net.Listen("tcp", net.JoinHostPort("", "15001"))
				if err != nil {
					t.Fatal(err)
				}
				defer envoy.Close()
				vip := newWorld(f).addresses[0]
				stream, err := net.Dial("tcp", net.JoinHostPort(vip.String(), "443"))
				if err != nil {
					t.Fatal(err)
				}
				alive := func() bool {
					stream.SetDeadline(time.Now().Add(500 * time.Millisecond))
					if _, err := stream.Write([]byte("x")); err != nil {
						return false
					}
					_, err := stream.Read(make([]byte, 1))
					return err == nil
				}
				if !alive() {
					t.Fatal("the stream does not work to begin with")
				}
				i := Interception{Family: f, ProxyUID: proxyUID, ProxyGID: proxyGID, Jumps: true,
					OutboundPort: outboundPort, Settling: settling}
				i.ServicePorts = []uint16{443}
				apply(t, k, i.Ruleset())
				if got := alive(); got != settling {
					t.Fatalf("after the first install: alive %v", got)
				}
				if !settling {
					return
				}
				i.Settling = false
				apply(t, k, i.Ruleset())
				if !alive() {
					t.Error("cut when the settling row went")
				}
			})
		})
	}
}
