package iptables

import "testing"

// What is at the head of whichever chain OUTPUT jumps to lets the user out, once.
func TestLetOut(t *testing.T) {
	const theirs = `*nat
:OUTPUT ACCEPT [0:0]
:SERVICE_PROXY_OUTPUT - [0:0]
:SERVICE_PROXY_INBOUND - [0:0]
:SERVICE_PROXY_DNS - [0:0]
:DOCKER - [0:0]
-A PREROUTING -p tcp -j SERVICE_PROXY_INBOUND
-A OUTPUT -j DOCKER
-A OUTPUT -j SERVICE_PROXY_OUTPUT
-A OUTPUT -p tcp -m tcp --dport 1 -j SERVICE_PROXY_OUTPUT
-A OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS
-A SERVICE_PROXY_OUTPUT -m owner --uid-owner 997 -j RETURN
-A SERVICE_PROXY_OUTPUT -m owner --uid-owner 0 -j RETURN
-A SERVICE_PROXY_OUTPUT -p tcp -j REDIRECT --to-ports 15001
-A SERVICE_PROXY_DNS -p udp -j REDIRECT --to-ports 15053
-A SERVICE_PROXY_DNS -m owner --uid-owner 998 -j RETURN
COMMIT
`
	have, err := Parse(IPv4, []byte(theirs))
	if err != nil {
		t.Fatal(err)
	}
	const want = `*nat
-I SERVICE_PROXY_OUTPUT 1 -m owner --uid-owner 998 -j RETURN
-I SERVICE_PROXY_DNS 1 -m owner --uid-owner 998 -j RETURN
COMMIT
`
	if plan := letOut(have, 998).String(); plan != want {
		t.Errorf("have\n%swant\n%s", plan, want)
	}
	const other = "*nat\n-I SERVICE_PROXY_DNS 1 -m owner --uid-owner 997 -j RETURN\nCOMMIT\n"
	if plan := letOut(have, 997).String(); plan != other {
		t.Errorf("have\n%swant\n%s", plan, other)
	}
	ours := Interception{Family: IPv4, ProxyUID: 5, ProxyGID: 6, OutboundPort: 15001, Jumps: true}
	table, err := Parse(IPv4, []byte(ours.Ruleset().String()))
	if err != nil {
		t.Fatal(err)
	}
	if plan := letOut(table, 5); !plan.Empty() {
		t.Errorf("ours lets it out, and yet\n%s", plan)
	}
	if plan := letOut(table, 7); plan.Empty() {
		t.Error("ours does not let others out")
	}
}
