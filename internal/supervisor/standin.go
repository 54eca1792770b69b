package supervisor

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
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

// standIn answers a child in the place of its parent, until limit has passed or the child has told
// the parent to end. Envoy 1.40.0 tries ten seconds to reach a dead parent, while its main thread
// stands, and then aborts; so a drained epoch that crashes would take the one that serves along.
func standIn(prefix string, base uint32, epoch int, limit time.Duration) error {
	at := socketOf(prefix, "parent", base, epoch)
	if filepath.IsAbs(at) {
		os.Remove(at) // the dead one's
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("stand in for epoch %d: %w", epoch, err)
	}
	_ = conn.SetDeadline(time.Now().Add(limit))
	child := &net.UnixAddr{Name: socketOf(prefix, "child", base, epoch+1), Net: "unixgram"}
	go func() {
		defer conn.Close()
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			request := buf[:n]
			if n > 10 && request[8] == tagRequest {
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
