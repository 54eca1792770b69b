package explain

import "fmt"

// Agreement is how what the rules say stands to what became of a connection.
type Agreement string

const (
	Agree     Agreement = "agree"
	Differ    Agreement = "differ"     // one of the two is wrong
	OnlyTried Agreement = "only tried" // the rules alone do not tell
	OnlyRules Agreement = "only rules" // what the kernel did could not be told
)

// Tried is a real connection.
type Tried struct {
	Agreement Agreement `json:"agreement,omitempty"`
	Rules     string    `json:"rules,omitempty"`  // what they say of it
	Kernel    string    `json:"kernel,omitempty"` // where the kernel led it, and what came of it
	Answer    string    `json:"answer,omitempty"` // connected, refused, no answer, ...
	// Port is the port of this machine that it was redirected to; 0: to none.
	Port   uint16 `json:"port,omitempty"`
	TookMS int64  `json:"took_ms"`
	// Error says why it was not made, or why nothing could be seen of it.
	Error string `json:"error,omitempty"`
}

// String says in a line what became of it.
func (t Tried) String() string {
	switch {
	case t.Error != "":
		return "could not be tried: " + t.Error
	case t.Agreement == Agree:
		return t.Kernel + "; rules and kernel agree"
	case t.Agreement == Differ:
		return t.Kernel + "; BUT " + t.Rules
	}
	return t.Kernel
}

// tried sets a real connection beside the answer. Where the rules do not tell it decides; where the
// two differ nothing does.
func (w why) tried() {
	if w.s.Tried == nil {
		return
	}
	t := *w.s.Tried
	t.Rules, t.Kernel, t.Error = safe(t.Rules), safe(t.Kernel), safe(t.Error)
	w.answer.Tried = &t
	if t.Error != "" {
		return
	}
	switch t.Agreement {
	case Differ:
		w.answer.Verdict, w.answer.Port = Unknown, 0
		w.say("", "look with `nft list ruleset` and `"+w.program()+"-save -t raw` for what decides "+
			"without being in the list of table nat: NOTRACK, an nftables chain or rule, the other "+
			"iptables backend; and tell us of it where there is none",
			"what the rules say is not what happened: %s; %s", t.Rules, t.Kernel)
	case OnlyTried:
		w.answer.Verdict, w.answer.Port = NotIntercepted, 0
		if t.Port != 0 && w.s.Known && (t.Port == w.s.Asked.OutboundPort || t.Port == w.s.Asked.DNSPort) {
			w.answer.Verdict, w.answer.Port = Intercepted, t.Port
		}
		w.answer.Next = ""
		w.answer.Why = fmt.Sprintf("%s; by the rules alone it could not be told: %s", t.Kernel,
			w.answer.Why)
	}
}
