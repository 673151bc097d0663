package main

import (
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path"
	"strings"

	"github.com/golang-jwt/jwt/v5"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// maxBody bounds the bodies that are read here, in bytes.
const maxBody = 16 << 20

// front is the one address for browsers. It serves the pages, hands everything else on to the homeserver and to LiveKit, and tells the watch
// what it sees pass by.
type front struct {
	pages   *pages
	watch   *watch
	hsToken string // with which the homeserver shows who it is
	room    string // the ID of the room of the call
}

// handler returns the handler of all requests. It is given the URLs of the homeserver and of LiveKit.
func (f *front) handler(homeserver, sfu string) (http.Handler, error) {
	toHomeserver, err := proxyTo(homeserver)
	if err != nil {
		return nil, err
	}
	toSFU, err := proxyTo(sfu)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/_matrix/", toHomeserver)
	mux.Handle("POST "+servicePath+"/", f.leaves(toHomeserver))
	mux.Handle(sfuPath+"/", http.StripPrefix(sfuPath, f.connections(toSFU)))
	mux.HandleFunc("PUT /_matrix/app/v1/transactions/{id}", f.events)
	mux.Handle("GET /join/{name}", f.join(rand.Text()))
	mux.Handle("/", f.pages)
	return mux, nil
}

// join sends a browser to the room. All must have the same password, with which Element Call encrypts the media. It is behind the #, so that
// the browser keeps it. Under the name Element Call makes an account.
func (f *front) join(password string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query := url.Values{
			"roomId": {f.room}, "viaServers": {"localhost"}, "password": {password}, "displayName": {r.PathValue("name")},
		}
		http.Redirect(w, r, "/room/#/call?"+query.Encode(), http.StatusFound)
	})
}

// proxyTo returns a proxy that hands requests on to a URL.
func proxyTo(text string) (*httputil.ReverseProxy, error) {
	target, err := url.Parse(text)
	return &httputil.ReverseProxy{
		ErrorLog: log.New(io.Discard, "", 0), // a tab that crashes aborts its requests
		Rewrite:  func(r *httputil.ProxyRequest) { r.SetURL(target) },
	}, err
}

// connections hands requests on to LiveKit, and tells the watch whose connection begins and ends.
func (f *front) connections(toSFU *httputil.ReverseProxy) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, known := participantOf(r.URL.Query().Get("access_token"))
		proxy := *toSFU
		proxy.ModifyResponse = func(res *http.Response) error {
			if known = known && res.StatusCode == http.StatusSwitchingProtocols; known {
				f.watch.connected(p)
			}
			return nil
		}
		defer func() {
			if known {
				f.watch.disconnected(p)
			}
		}()
		proxy.ServeHTTP(w, r)
	})
}

// leaves hands requests for tokens on to the homeserver, and tells the watch whose leave event the homeserver takes over.
func (f *front) leaves(toHomeserver *httputil.ReverseProxy) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		proxy := *toHomeserver
		if gjson.GetBytes(body, "delay_id").Exists() {
			r.Header.Del("Accept-Encoding") // the answer is read here
			proxy.ModifyResponse = f.takenOver
		}
		proxy.ServeHTTP(w, r)
	})
}

// takenOver reads the answer to a request that hands over a leave event. The participant's names are in the token.
func (f *front) takenOver(res *http.Response) error {
	if res.StatusCode != http.StatusOK {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	_ = res.Body.Close()
	res.Body = io.NopCloser(bytes.NewReader(body))
	if p, known := participantOf(gjson.GetBytes(body, "jwt").Str); known {
		f.watch.handedOver(p)
	}
	return err
}

// participantOf returns whom a token of LiveKit is for. Whether it is valid, LiveKit says.
func participantOf(token string) (livekit.Participant, bool) {
	var claims struct {
		jwt.RegisteredClaims
		Video struct {
			Room string `json:"room"`
		} `json:"video"`
	}
	_, _, err := jwt.NewParser().ParseUnverified(token, &claims)
	return livekit.Participant{Room: claims.Video.Room, Identity: claims.Subject}, err == nil && claims.Subject != ""
}

// events takes the events of all rooms from the homeserver.
func (f *front) events(w http.ResponseWriter, r *http.Request) {
	if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), []byte("Bearer "+f.hsToken)) != 1 {
		http.Error(w, "not the homeserver", http.StatusForbidden)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	for _, event := range gjson.GetBytes(body, "events").Array() {
		f.watch.event(event)
	}
	_, _ = io.WriteString(w, "{}")
}

// pages are Element Call's pages, as a site of its own.
type pages struct {
	files fs.FS
	index []byte
}

// openPages returns the pages in a folder. Their package is meant to be embedded in another site. Calls have paths of their own, so index.html
// needs a base from which the other files are found.
func openPages(dir string) (*pages, error) {
	p := &pages{files: os.DirFS(dir)}
	index, err := fs.ReadFile(p.files, "index.html")
	if err != nil {
		return nil, fmt.Errorf("reading Element Call's pages in %s: %w", dir, err)
	}
	p.index = bytes.Replace(index, []byte("<head>"), []byte(`<head><base href="/">`), 1)
	return p, nil
}

// ServeHTTP serves the file with the path's name, if there is one. All other paths are those of calls, and have the same page. The
// configuration names the homeserver at the address at which the browser is, so that it is on the same site.
func (p *pages) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(path.Clean(r.URL.Path), "/")
	if name == "config.json" {
		type m = map[string]any
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(m{"default_server_config": m{"m.homeserver": m{
			"base_url": "http://" + r.Host, "server_name": "localhost",
		}}})
		return
	}
	if file, err := fs.Stat(p.files, name); err != nil || file.IsDir() || name == "index.html" {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write(p.index)
		return
	}
	http.ServeFileFS(w, r, p.files, name)
}
