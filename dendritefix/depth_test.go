package dendritefix

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/jsondepth"
)

func nested(levels int) string { return strings.Repeat(`[`, levels) + strings.Repeat(`]`, levels) }

// echo answers with the request's body, and with 500 if it cannot be read, as Dendrite does.
var echo = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		w.Header().Set("Content-Length", "5")
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, "error")
		return
	}
	_, _ = w.Write(body)
})

func TestBoundDepth(t *testing.T) {
	s := httptest.NewServer(BoundDepth(echo))
	defer s.Close()
	for name, test := range map[string]struct {
		body string
		code int
	}{
		"none":      {"", 200},
		"at most":   {nested(jsondepth.Max), 200},
		"one more":  {nested(jsondepth.Max + 1), 400},
		"many more": {nested(1 << 20), 400},
		"late":      {`[` + strings.Repeat(`"x",`, 1<<16) + nested(jsondepth.Max) + `]`, 400},
		"not JSON":  {"\xff}}}]", 200},
		"large":     {`["` + strings.Repeat("[", 1<<20) + `"]`, 200},
	} {
		t.Run(name, func(t *testing.T) {
			res, err := http.Post(s.URL, "application/json", strings.NewReader(test.body))
			require.NoError(t, err)
			body, err := io.ReadAll(res.Body)
			require.NoError(t, err)
			require.NoError(t, res.Body.Close())
			require.Equal(t, test.code, res.StatusCode)
			if test.code == http.StatusOK {
				require.Equal(t, test.body, string(body))
				return
			}
			require.Equal(t, "M_BAD_JSON", gjson.GetBytes(body, "errcode").Str)
			require.Contains(t, gjson.GetBytes(body, "error").Str, "200 levels")
			require.Equal(t, "*", res.Header.Get("Access-Control-Allow-Origin"))
			require.Equal(t, "application/json", res.Header.Get("Content-Type"))
		})
	}
}

// If the handler answers before it has read the body, its answer stands.
func TestAnswersBefore(t *testing.T) {
	w := httptest.NewRecorder()
	BoundDepth(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.WriteHeader(http.StatusAccepted)
		_, err := io.ReadAll(req.Body)
		require.ErrorIs(t, err, errTooDeep)
		_, err = req.Body.Read(nil)
		require.ErrorIs(t, err, errTooDeep)
		_, _ = io.WriteString(w, "accepted")
	})).ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/", strings.NewReader(nested(jsondepth.Max+1))))
	require.Equal(t, http.StatusAccepted, w.Code)
	require.Equal(t, "accepted", w.Body.String())
}

// The body is streamed, and its deadlines can be set.
func TestStreams(t *testing.T) {
	read := make(chan string)
	s := httptest.NewServer(BoundDepth(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		control := http.NewResponseController(w)
		part := make([]byte, 10)
		n, err := req.Body.Read(part)
		if err == nil {
			err = control.SetReadDeadline(time.Now().Add(time.Minute))
		}
		if err != nil {
			read <- err.Error()
		}
		read <- string(part[:n])
		_, _ = io.Copy(io.Discard, req.Body)
	})))
	defer s.Close()
	body, client := io.Pipe()
	req, err := http.NewRequest(http.MethodPut, s.URL, body)
	require.NoError(t, err)
	answered := make(chan error, 1)
	go func() {
		res, err := http.DefaultClient.Do(req)
		if err == nil {
			err = res.Body.Close()
		}
		answered <- err
	}()
	_, err = io.WriteString(client, `{"a":`)
	require.NoError(t, err)
	require.Equal(t, `{"a":`, <-read, "before the rest comes")
	_, err = io.WriteString(client, `1}`)
	require.NoError(t, err)
	require.NoError(t, client.Close())
	require.NoError(t, <-answered)
}

// FuzzDepth reads a body byte by byte. It must be readable if and only if jsondepth.TooDeep is false for the whole text. Package jsondepth
// compares that function with encoding/json.
func FuzzDepth(f *testing.F) {
	for _, seed := range []string{`{"a":[1,"]"]}`, `"\\"`, `["\"[["}`, `{"\\":{"\u005b":"\u0022[["}}`, `[[],[[]],{}]`} {
		f.Add([]byte(seed), jsondepth.Max-2)
	}
	f.Fuzz(func(t *testing.T, text []byte, around int) {
		if !json.Valid(text) {
			return
		}
		around = min(max(around, 0), jsondepth.Max+2)
		text = []byte(strings.Repeat(`[`, around) + string(text) + strings.Repeat(`]`, around))
		body := &boundBody{ReadCloser: io.NopCloser(oneByte{bytes.NewReader(text)})}
		got, err := io.ReadAll(body)
		if jsondepth.TooDeep(text) {
			require.ErrorIs(t, err, errTooDeep)
			return
		}
		require.NoError(t, err)
		require.Equal(t, text, got)
	})
}

// oneByte reads a byte at a time.
type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(len(p), 1)]) }

func BenchmarkBoundDepth(b *testing.B) {
	for name, text := range map[string]string{
		"small": `{"application":"m.call","call_id":"","m.will_expire":30}`,
		"large": `[` + strings.Repeat(`{"body":"a message of some words","n":[1,2]},`, 5_000) + `1]`,
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(text)))
			handler := BoundDepth(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
				_, _ = io.Copy(io.Discard, req.Body)
			}))
			w := httptest.NewRecorder()
			for b.Loop() {
				handler.ServeHTTP(w, httptest.NewRequest(http.MethodPut, "/", strings.NewReader(text)))
			}
		})
	}
}
