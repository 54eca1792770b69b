package report

import "github.com/service-proxy-agent/service-proxy-agent/internal/symptom"

// Event is something that happened and is worth telling. Every channel that tells a story (the log,
// serial port 1, Cloud Logging) tells the same events in the order in which they happened.
type Event struct {
	Severity Severity
	Message  string // one line for people
	// Finding is what the event is about: it came, or is over. Zero: about none.
	Finding symptom.Finding
	// Fields are for programs, e.g. {"service", "web"}. Keys are of a-z and _; no value is a token, a
	// header, a dump or the query of a URL.
	Fields []Field
}

// Field is a name and a value of an [Event].
type Field struct{ Key, Value string }
