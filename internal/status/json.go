package status

import (
	"encoding/json"
	"slices"
)

// MarshalJSON names the form, and has every list there, empty or not: no reader need ask for null.
func (s Status) MarshalJSON() ([]byte, error) {
	type plain Status // without this method
	s.Schema = Schema
	s.Findings, s.Families = list(s.Findings), list(s.Families)
	s.Services, s.ServingPorts = list(s.Services), list(s.ServingPorts)
	s.Cost.Questions = list(s.Cost.Questions)
	s.Channels, s.History, s.Samples = list(s.Channels), list(s.History), list(s.Samples)
	if slices.ContainsFunc(s.Families, func(f Family) bool { return f.Left == nil }) {
		s.Families = slices.Clone(s.Families) // others read it
		for i := range s.Families {
			s.Families[i].Left = list(s.Families[i].Left)
		}
	}
	if slices.ContainsFunc(s.Services, func(one Service) bool { return one.Addresses == nil }) {
		s.Services = slices.Clone(s.Services)
		for i := range s.Services {
			s.Services[i].Addresses = list(s.Services[i].Addresses)
		}
	}
	return json.Marshal(plain(s))
}

func list[T any](some []T) []T {
	if some == nil {
		return []T{}
	}
	return some
}
