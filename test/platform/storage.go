package platform

import (
	"bytes"
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const storageHost = "storage.googleapis.com"

type bucket struct {
	public  bool
	objects map[string][]byte
}

// PutObject stores gs://BUCKET/NAME.
func (e *Emulator) PutObject(bucketName, name string, content []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.bucket(bucketName).objects[name] = content
}

// DeleteObject removes gs://BUCKET/NAME.
func (e *Emulator) DeleteObject(bucketName, name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.bucket(bucketName).objects, name)
}

// MakePublic lets everybody read a bucket: its objects are https:// sources as well, at https://storage.googleapis.com/BUCKET/NAME.
func (e *Emulator) MakePublic(bucketName string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.bucket(bucketName).public = true
}

func (e *Emulator) bucket(name string) *bucket {
	if e.buckets[name] == nil {
		e.buckets[name] = &bucket{objects: make(map[string][]byte)}
	}
	return e.buckets[name]
}

// storage is Cloud Storage for readers: GET /storage/v1/b/BUCKET/o/OBJECT (with ?alt=media the content, else what is known of it), the same under
// /download, and the XML form GET /BUCKET/OBJECT. A private bucket wants the VM's token. Ranges work.
func (e *Emulator) storage(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		apiError(w, http.StatusMethodNotAllowed, "method not allowed")
		return
	}
	bucketName, name, media, ok := parseObject(r.URL)
	if !ok {
		apiError(w, http.StatusNotFound, "Not Found")
		return
	}
	e.mu.Lock()
	b := e.buckets[bucketName]
	var content []byte
	found := false
	if b != nil {
		content, found = b.objects[name]
	}
	public := b != nil && b.public
	e.mu.Unlock()
	if !public && !e.authorized(w, r) {
		return
	}
	switch {
	case !found:
		apiError(w, http.StatusNotFound, fmt.Sprintf("No such object: %s/%s", bucketName, name))
	case media:
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("X-Goog-Hash", "crc32c="+crc32c(content)+",md5="+md5sum(content))
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	default:
		respond(w, http.StatusOK, map[string]any{
			"kind": "storage#object", "bucket": bucketName, "name": name, "size": strconv.Itoa(len(content)), "generation": "1", "metageneration": "1",
			"contentType": "application/octet-stream", "crc32c": crc32c(content), "md5Hash": md5sum(content),
			"mediaLink": fmt.Sprintf("https://%s/download/storage/v1/b/%s/o/%s?generation=1&alt=media", storageHost, bucketName, url.PathEscape(name)),
		})
	}
}

// parseObject reads the two forms of an object's address. In the JSON form the name's slashes are escaped, so the path is read as it was sent.
func parseObject(u *url.URL) (bucketName, name string, media, ok bool) {
	path := strings.TrimPrefix(u.EscapedPath(), "/download")
	if rest, isJSON := strings.CutPrefix(path, "/storage/v1/b/"); isJSON {
		b, o, found := strings.Cut(rest, "/o/")
		bucketName, err1 := url.PathUnescape(b)
		name, err2 := url.PathUnescape(o)
		return bucketName, name, u.Query().Get("alt") == "media", found && err1 == nil && err2 == nil && name != ""
	}
	bucketName, name, ok = strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	return bucketName, name, true, ok && bucketName != "" && name != ""
}

func crc32c(content []byte) string {
	var sum [4]byte
	binary.BigEndian.PutUint32(sum[:], crc32.Checksum(content, crc32.MakeTable(crc32.Castagnoli)))
	return base64.StdEncoding.EncodeToString(sum[:])
}

func md5sum(content []byte) string {
	sum := md5.Sum(content)
	return base64.StdEncoding.EncodeToString(sum[:])
}
