package symptom

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// closedAgent: Google's own agent has our unit's name, chains and guest attributes. Two that write
// the same undo each other, so nothing here leads the daemon to change anything: who takes over is
// a person's decision.
func closedAgent(f Facts) []Finding {
	c := f.ClosedAgent
	if c == nil {
		return nil
	}
	const takeOver = "sudo service-proxy-agent bootstrap --take-over"
	found := finding(ClosedAgentHere, 39, Warning,
		"remove it, or have `"+takeOver+"` see to it that it does not start",
		"Google's own agent is installed on this VM, and does not run: %s",
		safe(cmp.Or(name(c.Unit), name(c.Binary), name(c.Writes), "see below")))
	if c.runs() {
		what := "its unit starts it: " + name(c.Unit)
		if c.Process != "" {
			what = "its process is " + name(c.Process)
		}
		found = finding(ClosedAgentHere, 39, Error,
			"`"+takeOver+"` stops it and takes its rules over: new connections to services are refused "+
				"for a moment, none goes past Envoy; `sudo service-proxy-agent bootstrap --remove` gives "+
				"them back",
			"Google's own agent is on this VM, too, and writes the same rules and guest attributes: %s",
			safe(what))
	}
	return []Finding{found.
		seen(FromUnit, time.Time{}, c.Unit).
		seen(FromProcesses, time.Time{}, c.Process).
		seen(FromProcesses, time.Time{}, c.Binary).
		seen(FromMetadata, time.Time{}, c.Writes).
		try("systemctl status service-proxy-agent", "systemctl cat service-proxy-agent",
			"pgrep -af service-proxy-agent", takeOver)}
}

// otherVMsState: what a cloned disk brought along, and nobody used.
func otherVMsState(f Facts) []Finding {
	d := f.Discarded
	if d == nil {
		return nil
	}
	what := safe("all of it")
	if len(d.What) > 0 {
		what = few(d.What, 2*someNames, short)
	}
	found := finding(OtherVMsState, 40, Advice,
		"nothing to do; `service-proxy-agent bootstrap --prepare-image` makes an image that holds none",
		"State of another VM (instance %s) was found at the start and discarded, since this VM is %s: %s",
		cmp.Or(short(d.Instance), "unknown"), cmp.Or(short(d.This), "another one"), what).
		seen(FromState, d.At, fmt.Sprintf("instance %s", name(d.Instance))).
		seen(FromMetadata, d.At, "instance/id "+name(d.This)).
		try(askMetadata("", "instance/id"),
			"sudo journalctl SERVICE_PROXY_ID="+string(OtherVMsState))
	found.Since = d.At
	return []Finding{found}
}

// InterceptionMetadata is the key by which a whole fleet's interception is turned off.
const InterceptionMetadata = "service-proxy-agent-interception"

// brake: interception is off because somebody wants it so.
func brake(f Facts) (out []Finding) {
	if f.Brake.Off {
		since := ""
		if !f.Brake.Since.IsZero() {
			since = " since " + f.Brake.Since.UTC().Format(time.RFC3339)
		}
		remove := f.metadataKey(f.Brake.By, "remove-metadata", "--keys="+InterceptionMetadata)
		is, so := safe("is off"), safe(", as intended")
		effect := safe("services are reached past Envoy")
		if slices.ContainsFunc(f.Families, Family.stuck) { // another finding says why
			is, so = "shall be off", ""
			effect = "the rules are not known to be changed, and may still lead to Envoy"
		}
		found := finding(InterceptionOff, 41, Warning, "to end it: "+remove,
			"Interception %s%s%s: %s has %s=off; %s",
			is, safe(since), so, whose(f.Brake.By), safe(InterceptionMetadata), effect).
			seen(FromMetadata, f.Brake.Since, name(f.Brake.By)+"/attributes/"+InterceptionMetadata+": off").
			try(readBrake(f.Brake.By), remove)
		found.Since = f.Brake.Since
		out = append(out, found)
	}
	if f.Brake.Bad != "" {
		out = append(out, finding(InterceptionKey, 41, Warning,
			"write off or bypass-when-down, or take the key away; until then nothing is changed",
			"The brake %s=%q of %s is neither off nor bypass-when-down",
			safe(InterceptionMetadata), short(f.Brake.Bad), whose(f.Brake.BadBy)).
			under(f.Brake.BadBy).
			seen(FromMetadata, time.Time{},
				name(f.Brake.BadBy)+"/attributes/"+InterceptionMetadata+": "+short(f.Brake.Bad)).
			try(readBrake(f.Brake.BadBy),
				f.metadataKey(f.Brake.BadBy, "remove-metadata", "--keys="+InterceptionMetadata)))
	}
	return out
}

// stuck says that what is wanted may not be in the kernel, though it could be.
func (f Family) stuck() bool { return f.Unusable == nil && (f.Err != nil || f.Fighting) }

// whose is where the brake's key was read.
func whose(by string) safe {
	switch by {
	case "", ByInstance:
		return "this VM's metadata"
	case ByProject:
		return "the project's metadata"
	}
	return safe("the metadata of " + name(by))
}

// metadataKey changes a key of the metadata of the instance or its project.
func (f Facts) metadataKey(of, verb, flag string) string {
	if of == ByProject {
		return "gcloud compute project-info " + verb + " --project=" + f.project() + " " + flag
	}
	return f.instance(verb, flag)
}

// readBrake asks what the brake's key says, with a newline behind it.
func readBrake(of string) string {
	if of != ByProject {
		of = ByInstance
	}
	return askMetadata("", of+"/attributes/"+InterceptionMetadata) + "; echo"
}
