package agent

import (
	"net"
	"regexp"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// settleTime is how long after bootstrap has finished Envoy may still be seen as it was before.
const settleTime = 30 * time.Second

// settled says whether the Envoy that is seen is the one that bootstrap wants: it changes nothing,
// is not about to, and did not do so just now.
func settled(boot progress.State, text []byte, now time.Time) bool {
	switch boot.Status {
	case progress.InProgress:
		return false
	case progress.Finished:
		return (text == nil || !boot.Stale(text)) && now.Sub(boot.Time).Abs() >= settleTime
	}
	return true
}

// compareEnvoy fills in whom Envoy should be and is: by the attribute and the metadata server, and
// by what bootstrap has written.
func (o Observation) compareEnvoy(f *symptom.Facts) {
	if o.Envoy.Err != nil || !settled(o.Bootstrap, o.Attribute.text, o.Now) {
		return
	}
	f.Configured, f.Running = configured(o.Bootstrap), running(o.Envoy)
	if f.Configured == nil || f.Running == nil {
		f.Configured, f.Running = nil, nil
	}
	presented := presentedNode(o.Envoy)
	if presented == nil || o.VM.ProjectNumber == "" {
		return
	}
	if !o.Attribute.Known && o.Attribute.Err == nil {
		return // it may come yet, and name another network
	}
	f.Node, f.Presented = expectedNode(o, *presented), presented
}

// configured is what bootstrap has written for Envoy; nil: nothing, or that is not known.
func configured(boot progress.State) *symptom.EnvoyConfig {
	wrote := boot.Envoy
	if wrote == nil || boot.Status != progress.Finished {
		return nil
	}
	return &symptom.EnvoyConfig{NodeID: wrote.Node, Targets: wrote.Targets, From: wrote.File}
}

// running is what the Envoy that answers was started with; nil: not known.
func running(v envoywatch.View) *symptom.EnvoyConfig {
	if v.Started == nil {
		return nil
	}
	is := &symptom.EnvoyConfig{NodeID: v.Started.Node.ID, From: v.Info.Config}
	for _, t := range v.Started.Targets {
		is.Targets = append(is.Targets, t.Address)
	}
	return is
}

// Traffic Director's own names in Envoy's node.
const (
	nodePrefix    = "TRAFFICDIRECTOR_"
	networkKey    = nodePrefix + "NETWORK_NAME"
	projectKey    = nodePrefix + "GCP_PROJECT_NUMBER"
	directorsName = "trafficdirector.googleapis.com"
)

// nodeID is a node's id in the form of its API v3.
var nodeID = regexp.MustCompile(`^projects/([^/]*)/networks/([^/]*)/nodes/`)

// presentedNode is how Envoy presents itself to Traffic Director; nil where it asks another control
// plane, which knows no such names, or that is not known.
func presentedNode(v envoywatch.View) *symptom.Node {
	node := v.Info.Node
	if !asksDirector(v) {
		return nil
	}
	is := &symptom.Node{ID: node.ID, ProjectNumber: node.Metadata[projectKey],
		Network: node.Metadata[networkKey]}
	if m := nodeID.FindStringSubmatch(node.ID); m != nil { // it counts where both are there
		is.ProjectNumber, is.Network = m[1], m[2]
	}
	return is
}

func asksDirector(v envoywatch.View) bool {
	for key := range v.Info.Node.Metadata {
		if strings.HasPrefix(key, nodePrefix) {
			return true
		}
	}
	if v.Started == nil {
		return false
	}
	for _, t := range v.Started.Targets {
		if host, _, err := net.SplitHostPort(t.Address); err == nil && host == directorsName {
			return true
		}
	}
	return false
}

// expectedNode is how Envoy should present itself: as the attribute says, else as the VM is. What
// the attribute does not name may be one of several: the network of a shared VPC belongs to another
// project, and a mesh or a scope of any name takes the network's place in the id.
func expectedNode(o Observation, presented symptom.Node) *symptom.Node {
	c := o.Attribute.Config
	want := &symptom.Node{ProjectNumber: o.VM.ProjectNumber, Network: o.VM.Network}
	switch {
	case c.ProjectNumber != "":
		want.ProjectNumber = c.ProjectNumber
	case presented.ProjectNumber != "" && presented.ProjectNumber == o.VM.NetworkProject:
		want.ProjectNumber = presented.ProjectNumber
	}
	named := strings.HasPrefix(presented.Network, "mesh:") ||
		strings.HasPrefix(presented.Network, "scope:")
	switch {
	case c.Mesh != "":
		want.Network = "mesh:" + c.Mesh
	case c.Scope != "":
		want.Network = "scope:" + c.Scope
	case c.Network != "":
		want.Network = c.Network
	case named:
		want.Network = presented.Network
	}
	return want
}
