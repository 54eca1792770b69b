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
	denied  bool
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

// MakePublic lets everybody read a bucket: its objects are https:// sources as well, at
// https://storage.googleapis.com/BUCKET/NAME.
func (e *Emulator) MakePublic(bucketName string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.bucket(bucketName).public = true
}

// Deny takes the right to read a bucket from the VM's service account.
func (e *Emulator) Deny(bucketName string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.bucket(bucketName).denied = true
}

// accessDenied is the XML form's refusal.
func accessDenied(w http.ResponseWriter, who string) {
	w.Header().Set("Content-Type", "application/xml; charset=UTF-8")
	w.WriteHeader(http.StatusForbidden)
	fmt.Fprintf(
		w, "<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code><Message>Access "+
			"denied.</Message><Details>%s does not have "+
			"storage.objects.get access to the Google Cloud Storage object. Permission "+
			"'storage.objects.get' denied on resource (or it may not exist).</Details></Error>", who)
}

func (e *Emulator) bucket(name string) *bucket {
	if e.buckets[name] == nil {
		e.buckets[name] = &bucket{objects: make(map[string][]byte)}
	}
	return e.buckets[name]
}

// storage is Cloud Storage for readers: GET /storage/v1/b/BUCKET/o/OBJECT (with ?alt=media the
// content, else what is known of it), the same under /download, and the XML form GET
// /BUCKET/OBJECT. A private bucket wants the VM's token. Ranges work.
//
// What the real one says to those who may not read, there or not there ("or it may not exist"):
//   - XML form, no token: 403, <Code>AccessDenied</Code>, "Anonymous caller does not have
//     storage.objects.get access" (seen by many, kubernetes/test-infra#6986 and openai/glow#60
//     among them; the code's status is in Cloud Storage's documentation of XML errors);
//   - JSON form, no token: 401 with the same words (GoogleCloudPlatform/gsutil#817,
//     "ServiceException: 401 Anonymous caller");
//   - a token without the right: 403 in both (Superbalist/laravel-google-cloud-storage#14, reason
//     "forbidden");
//   - a token that is none: 401 in both (documented as authError; not seen for the XML form);
//   - an object that is not there, to a reader who may not list the bucket
//     (roles/storage.objectViewer may, so 404 is usual): 403, documented.
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
	public, denied, account := b != nil && b.public, b != nil && b.denied, e.vm.ServiceAccount
	e.mu.Unlock()
	if !public {
		isJSON := strings.HasPrefix(strings.TrimPrefix(r.URL.Path, "/download"), "/storage/v1/")
		switch {
		case r.Header.Get("Authorization") == "" && !isJSON:
			accessDenied(w, "Anonymous caller")
			return
		case !e.authorized(w, r):
			return
		case denied && isJSON:
			apiError(w, http.StatusForbidden,
				account+" does not have storage.objects.get access to the Google Cloud Storage object.")
			return
		case denied:
			accessDenied(w, account)
			return
		}
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
			"kind": "storage#object", "bucket": bucketName, "name": name, "size": strconv.Itoa(len(content)),
			"generation": "1", "metageneration": "1",
			"contentType": "application/octet-stream", "crc32c": crc32c(content), "md5Hash": md5sum(content),
			"mediaLink": fmt.Sprintf("https://%s/download/storage/v1/b/%s/o/%s?generation=1&alt=media",
				storageHost, bucketName, url.PathEscape(name)),
		})
	}
}

// parseObject reads the two forms of an object's address. In the JSON form the name's slashes are
// escaped, so the path is read as it was sent.
func parseObject(u *url.URL) (bucketName, name string, media, ok bool) {
	path := strings.TrimPrefix(u.EscapedPath(), "/download")
	if rest, isJSON := strings.CutPrefix(path, "/storage/v1/b/"); isJSON {
		b, o, found := strings.Cut(rest, "/o/")
		bucketName, err1 := url.PathUnescape(b)
		name, err2 := url.PathUnescape(o)
		return bucketName, name, u.Query().Get("alt") == "media", found && err1 == nil &&
			err2 == nil && name != ""
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
