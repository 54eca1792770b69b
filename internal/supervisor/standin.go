package supervisor

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"time"
)

// Sockets of an epoch, by which its child asks it, and by which it answers its parent: Envoy counts
// epochs modulo three there (source/server/hot_restarting_base.cc).
func socketOf(prefix, role string, base uint32, epoch int) string {
	return fmt.Sprintf("%s_%s_%d", prefix, role, 10*uint64(base)+uint64(epoch%3))
}

// Tags of envoy.HotRestartMessage (source/server/hot_restart.proto): field 1 is a request, and in
// it these fields tell which. Neither is answered.
const (
	tagRequest   = 1<<3 | 2
	tagDrain     = 4<<3 | 2
	tagTerminate = 5<<3 | 2
)

// didntRecognize is HotRestartMessage{didnt_recognize_your_last_message: true} behind its length:
// the child goes on without what it asked for.
var didntRecognize = append(binary.BigEndian.AppendUint64(nil, 2), 3<<3, 1)

// standIn takes what is sent to an epoch that is dead, until limit has passed. While Envoy cannot
// send to another one, its main thread stands, and after ten seconds it aborts (1.40.0). So a
// drained epoch that crashes would take the one that serves along, and a new one that dies the
// one before. See docs/design/facts.md#envoy-hot-restart-stands.
//
// As a parent it answers its child, until that has told it to end. As a child it says nothing.
func standIn(prefix string, base uint32, a StandIn, limit time.Duration) error {
	role := "parent"
	if a.Parent {
		role = "child"
	}
	at := socketOf(prefix, role, base, a.Epoch)
	os.Remove(at) // the dead one's
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("stand in for epoch %d: %w", a.Epoch, err)
	}
	_ = conn.SetDeadline(time.Now().Add(limit))
	child := &net.UnixAddr{Name: socketOf(prefix, "child", base, a.Epoch+1), Net: "unixgram"}
	go func() {
		defer conn.Close()
		if !a.Parent {
			// What it has asked for is lost with its parent, and it may wait for it.
			_, _ = conn.WriteTo(didntRecognize, child)
		}
		buf := make([]byte, 1<<16)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			if a.Parent {
				continue
			}
			if request := buf[:n]; n > 10 && request[8] == tagRequest {
				switch request[10] {
				case tagTerminate:
					return
				case tagDrain:
					continue
				}
			}
			_, _ = conn.WriteTo(didntRecognize, child) // a child that is dead asks no more
		}
	}()
	return nil
}
