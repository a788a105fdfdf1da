-- wrk -s wrk.lua URL -- BODY_FILE BEARER [EVENTS]
-- Posts one body over and over and ends by printing its tallies as one line of JSON.
-- With EVENTS, every complete reply must be a stream of exactly that many events.

local threads = {}
malformed = 0

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  file:close()
  wrk.headers["Content-Type"] = "application/json"
  wrk.headers["Authorization"] = "Bearer " .. args[2]
  if args[3] then
    local expected = tonumber(args[3])
    -- A global `response` makes wrk keep each body: affordable for streams, not for short replies.
    function response(status, _, body)
      local _, events = body:gsub("data: ", "")
      if status ~= 200 or events ~= expected then
        malformed = malformed + 1
      end
    end
  end
end

function done(summary, latency, _)
  local bad = 0
  for _, thread in ipairs(threads) do
    bad = bad + thread:get("malformed")
  end
  local errors = summary.errors
  io.write(string.format(
    'TALLY {"requests":%d,"duration_us":%d,"bytes":%d,"p50_us":%d,"p99_us":%d,' ..
    '"refused":%d,"broken":%d,"malformed":%d}\n',
    summary.requests, summary.duration, summary.bytes,
    latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect + errors.read + errors.write + errors.timeout, bad))
end
