package attribute

// Ports that the program and its Envoy listen on, unless a setting or a listener says otherwise. A
// serving port among them would redirect Envoy or the agent to itself.
const (
	EnvoyAdminPort = 15000 // Envoy's admin interface
	OutboundPort   = 15001 // outbound interception listener; proxy-port says another
	// inbound interception listener, as in Traffic Director's and Istio's samples
	InboundPort = 15006
	AgentPort   = 15020 // the agent's /metrics and /healthz
)

// OwnPorts are all of them.
func OwnPorts() []uint16 { return []uint16{EnvoyAdminPort, OutboundPort, InboundPort, AgentPort} }
