package agent

import (
	"reflect"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
)

// TestShape: who owns what shows in the types. A struct of many fields is a set of globals under
// another name, and a comment that says who may touch which is soon not true.
func TestShape(t *testing.T) {
	if n := reflect.TypeFor[Agent]().NumField(); n > 25 {
		t.Errorf("Agent has %d fields, at most 25", n)
	}
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(of reflect.Type) {
		switch of.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Array, reflect.Map, reflect.Chan:
			walk(of.Elem())
			return
		case reflect.Struct:
		default:
			return
		}
		path := of.PkgPath()
		ours := strings.HasSuffix(path, "/agent") || strings.HasSuffix(path, "/reconcile") ||
			strings.HasSuffix(path, "/envoywatch")
		if seen[of] || !ours {
			return
		}
		seen[of] = true
		if n := of.NumField(); n > 15 {
			t.Errorf("%v has %d fields, at most 15", of, n)
		}
		for field := range of.Fields() {
			walk(field.Type)
		}
	}
	walk(reflect.TypeFor[loop]())
	walk(reflect.TypeFor[passed]())
	walk(reflect.TypeFor[envoywatch.Watch]())
	if len(seen) < 20 {
		t.Errorf("only %d types were looked at", len(seen))
	}
}
