package explain

import (
	"encoding/json"
	"io"
)

// Schema names the form of an Answer in JSON, docs/explain.schema.json. Fields may be added to it.
const Schema = "service-proxy-agent/explain/v1"

// Printed is an Answer as `explain -o json` prints it: it names the form, and has every list there,
// empty or not.
type Printed struct {
	Schema  string `json:"schema"`
	Version string `json:"version"` // of the program
	Exit    int    `json:"exit"`    // the command's exit code
	Answer
}

// Print makes an Answer of this version's, with this exit code, fit to be printed.
func Print(a Answer, version string, exit int) Printed {
	a.Path, a.Notes = list(a.Path), list(a.Notes)
	a.Chains = append([]Chain{}, a.Chains...)
	for i := range a.Chains {
		c := &a.Chains[i]
		c.When, c.Hosts = list(c.When), append([]Host{}, c.Hosts...)
		c.Clusters = append([]Cluster{}, c.Clusters...)
		for i := range c.Hosts {
			c.Hosts[i].Domains, c.Hosts[i].Clusters = list(c.Hosts[i].Domains), list(c.Hosts[i].Clusters)
		}
		for i := range c.Clusters {
			c.Clusters[i].Endpoints = list(c.Clusters[i].Endpoints)
		}
	}
	return Printed{Schema, version, exit, a}
}

// JSON writes it for programs.
func (p Printed) JSON(out io.Writer) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	return encoder.Encode(p)
}

func list[T any](some []T) []T {
	if some == nil {
		return []T{}
	}
	return some
}
